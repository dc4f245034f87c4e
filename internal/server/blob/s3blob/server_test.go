// SPDX-License-Identifier: Apache-2.0

//go:build system

package s3blob_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/server/blob"
	"klatch/internal/server/blob/blobtest"
	"klatch/internal/server/blob/s3blob"
	"klatch/internal/testkit/s3server"
)

func open(t *testing.T, address string) *s3blob.Store {
	t.Helper()
	s, err := s3blob.Open(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestARealObjectStore runs the suite of package blob against versitygw.
func TestARealObjectStore(t *testing.T) {
	server := s3server.Start(t)
	blobtest.Run(t, func(t *testing.T) blob.Store { return open(t, server.Bucket()) })

	t.Run("what is beside the prefix is not ours", func(t *testing.T) {
		a := server.Bucket()
		ours, whole := open(t, a), open(t, strings.Replace(a, "/klatch?", "?", 1))
		if err := whole.Put(t.Context(), "other/x", []byte("x"), blob.Header{}); err != nil {
			t.Fatal(err)
		}
		if names, err := ours.List(t.Context(), ""); err != nil || len(names) != 0 {
			t.Errorf("%q, %v", names, err)
		}
	})
	t.Run("a store that is away, empty-handed or closed to us says so", func(t *testing.T) {
		away := httptest.NewServer(http.NotFoundHandler())
		away.Close()
		a := server.Bucket()
		for address, want := range map[string]fault.Kind{
			strings.Replace(a, server.Endpoint, away.URL, 1): fault.Unavailable,
			strings.Replace(a, "bucket-", "no-bucket-", 1):   fault.NotFound,
		} {
			if _, err := open(t, address).List(t.Context(), ""); fault.KindOf(err) != want || fault.HintOf(err) == "" {
				t.Errorf("%s: kind %q, want %q: %v", address, fault.KindOf(err), want, err)
			}
		}
		t.Setenv("AWS_SECRET_ACCESS_KEY", "wrong")
		_, err := open(t, a).List(t.Context(), "")
		if fault.KindOf(err) != fault.Denied || fault.HintOf(err) == "" || strings.Contains(err.Error(), "wrong") {
			t.Errorf("a wrong secret: %v", err)
		}
	})
}
