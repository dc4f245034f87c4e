// SPDX-License-Identifier: Apache-2.0

package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"regexp"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/obs"
	"klatch/internal/server/blob"
)

// servable are the paths of a repository and nothing else: no listing, no lock
// file, no temporary file of a write in progress.
var servable = regexp.MustCompile(`^/(left-out\.json|metadata/([1-9][0-9]*\.)?[a-z][a-z0-9._-]*\.json|targets/([0-9A-Za-z_][0-9A-Za-z.+~_-]*/)*[0-9a-f]{64}\.[0-9A-Za-z_][0-9A-Za-z.+~_-]*|` +
	`log/[0-9a-f]{8}/(checkpoint|cosigned|tile/([0-9]+|entries)/(x[0-9]{3}/)*[0-9]{3}(\.p/[1-9][0-9]{0,2})?))$`)

// changing are the files whose content does not follow from their name.
var changing = regexp.MustCompile(`^(metadata/timestamp\.json|left-out\.json|log/[0-9a-f]{8}/(checkpoint|cosigned))$`)

// Servable says whether a name is one of a repository's files.
func Servable(name string) bool { return servable.MatchString("/"+name) && len(name) <= 768 }

// Exportable says whether a name is one of a repository's files, or of the
// operator's below rollout/.
func Exportable(name string) bool {
	if own, ok := strings.CutPrefix(name, "rollout/"); ok {
		return (strings.HasPrefix(own, "metadata/") || strings.HasPrefix(own, "targets/")) && Servable(own)
	}
	return Servable(name)
}

// How long a cache may answer by itself: for a changing file not at all
// without asking. The answer is short, and unchanged files cost no body.
const (
	askAgain = "no-cache"
	forEver  = "public, max-age=31536000, immutable"
)

// HeaderOf says how a file of a repository is served, by us, by an object
// store or by a network of caches: files with a version, a digest or a place
// in the tree in their name never change; the timestamp, the log's checkpoints
// and the list of what is left out must be asked for every time.
func HeaderOf(name string) blob.Header {
	h := blob.Header{ContentType: "application/octet-stream", CacheControl: forEver}
	if strings.HasPrefix(name, "metadata/") || name == leftOutFile {
		h.ContentType = "application/json"
	}
	if changing.MatchString(name) {
		h.CacheControl = askAgain
	}
	return h
}

// maxChanging limits a file that is hashed at each request.
const maxChanging = maxLeftOut

// opener gives the bytes of a file; not_found if there is none.
type opener func(ctx context.Context, name string) (io.ReadSeekCloser, error)

// Handler serves metadata, targets and the transparency log, and nothing else.
func (r *Repo) Handler() http.Handler {
	return serve(func(ctx context.Context, name string) (io.ReadSeekCloser, error) { return r.files.Open(ctx, name) }, r.log)
}

// Files serves a repository in a folder in the same way: the operator's.
func Files(dir string) http.Handler {
	return serve(func(_ context.Context, name string) (io.ReadSeekCloser, error) {
		f, err := openIn(dir, name)
		if err != nil {
			return nil, blob.Missing(name, err)
		}
		return f, nil
	}, slog.New(slog.DiscardHandler))
}

// openIn opens a regular file; no link leads out of the folder.
func openIn(dir, name string) (*os.File, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close() //nolint:errcheck // read only
	f, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func serve(open opener, log *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if !servable.MatchString(q.URL.Path) {
			http.NotFound(w, q)
			return
		}
		name := q.URL.Path[1:]
		f, err := open(q.Context(), name)
		if err != nil {
			if k := fault.KindOf(err); k != fault.NotFound && k != fault.Invalid {
				log.LogAttrs(q.Context(), slog.LevelError, "file of the repository cannot be read", slog.String("file", name), obs.Err(err))
				http.Error(w, "the server cannot read its files now", http.StatusServiceUnavailable)
				return
			}
			http.NotFound(w, q)
			return
		}
		defer f.Close() //nolint:errcheck // read only
		h, header := w.Header(), HeaderOf(name)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", header.CacheControl)
		h.Set("Content-Type", header.ContentType)
		// The tag is of the content. A time would be worth less: two
		// timestamps may be written in one second.
		var content io.ReadSeeker = f
		tag := name
		if changing.MatchString(name) {
			b, err := io.ReadAll(io.LimitReader(f, maxChanging))
			if err != nil {
				http.Error(w, "the server cannot read its files now", http.StatusServiceUnavailable)
				return
			}
			content, tag = bytes.NewReader(b), string(b)
		}
		sum := sha256.Sum256([]byte(tag))
		h.Set("ETag", `"`+hex.EncodeToString(sum[:16])+`"`)
		http.ServeContent(w, q, "", time.Time{}, content)
	})
}
