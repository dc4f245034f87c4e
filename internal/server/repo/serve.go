// SPDX-License-Identifier: Apache-2.0

package repo

import (
	"net/http"
	"os"
	"regexp"
	"strings"
)

// servable are the paths of a repository and nothing else: no listing, no lock
// file, no temporary file of a write in progress.
var servable = regexp.MustCompile(`^/(metadata/([1-9][0-9]*\.)?[a-z][a-z0-9._-]*\.json|targets/([0-9A-Za-z_][0-9A-Za-z.+~_-]*/)*[0-9a-f]{64}\.[0-9A-Za-z_][0-9A-Za-z.+~_-]*|` +
	`log/[0-9a-f]{8}/(checkpoint|cosigned|tile/([0-9]+|entries)/(x[0-9]{3}/)*[0-9]{3}(\.p/[1-9][0-9]{0,2})?))$`)

// changing are the files whose content does not follow from their name.
var changing = regexp.MustCompile(`^/(metadata/timestamp\.json|log/[0-9a-f]{8}/(checkpoint|cosigned))$`)

// Handler serves metadata, targets and the transparency log. Files with a
// version, a digest or a place in the tree in their name never change; the
// timestamp and the log's checkpoints must be asked for every time.
func (r *Repo) Handler() http.Handler { return Files(r.dir) }

// Files serves the repository in a folder in that way; the operator's too.
func Files(dir string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if !servable.MatchString(q.URL.Path) {
			http.NotFound(w, q)
			return
		}
		root, err := os.OpenRoot(dir)
		if err != nil {
			http.NotFound(w, q)
			return
		}
		defer root.Close() //nolint:errcheck // read only
		f, err := root.Open(q.URL.Path[1:])
		if err != nil {
			http.NotFound(w, q)
			return
		}
		defer f.Close() //nolint:errcheck // read only
		st, err := f.Stat()
		if err != nil || !st.Mode().IsRegular() {
			http.NotFound(w, q)
			return
		}
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		if changing.MatchString(q.URL.Path) {
			h.Set("Cache-Control", "no-cache")
		} else {
			h.Set("Cache-Control", "public, max-age=31536000, immutable")
		}
		if strings.HasPrefix(q.URL.Path, "/metadata/") {
			h.Set("Content-Type", "application/json")
		} else {
			h.Set("Content-Type", "application/octet-stream")
		}
		http.ServeContent(w, q, "", st.ModTime(), f)
	})
}
