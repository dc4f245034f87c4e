// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"klatch/internal/fault"
)

// TestNobodySendsUsElsewhere: the owner named one source.
func TestNobodySendsUsElsewhere(t *testing.T) {
	asked := 0
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked++ }))
	defer other.Close()
	elsewhere := strings.Replace(other.URL, "127.0.0.1", "localhost", 1)
	named := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if strings.HasPrefix(q.URL.Path, "/moved/") {
			http.Redirect(w, q, strings.TrimPrefix(q.URL.Path, "/moved"), http.StatusFound)
			return
		}
		http.Redirect(w, q, elsewhere+q.URL.Path, http.StatusFound)
	}))
	defer named.Close()
	d := &data{dir: t.TempDir()}
	for _, path := range []string{"", "/moved"} {
		base, client, done, err := d.source(t.Context(), named.URL+path)
		if err != nil {
			t.Fatal(err)
		}
		a, err := client.Get(base + "/metadata/timestamp.json")
		if err == nil {
			a.Body.Close()
			t.Errorf("redirected from %s to %s", base, a.Request.URL)
		} else if !strings.Contains(err.Error(), "not the source that was named") {
			t.Error(err)
		}
		done()
	}
	if asked != 0 {
		t.Errorf("the other host was asked %d times", asked)
	}
	if _, _, _, err := d.source(t.Context(), "ftp://x.example"); fault.CodeOf(err) != "bad_url" {
		t.Error(err)
	}
}
