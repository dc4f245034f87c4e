// SPDX-License-Identifier: Apache-2.0

package s3blob_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/pki"
	"klatch/internal/server/blob/s3blob"
)

func TestAddressesOfBuckets(t *testing.T) {
	for _, good := range []string{"s3://bucket", "s3://bucket/a/b", "s3://bucket?region=eu-1", "s3://bucket/x?endpoint=http://127.0.0.1:7070&path_style=true"} {
		s, err := s3blob.Open(t.Context(), good)
		if err != nil || s.Place() != good {
			t.Errorf("%s: %v", good, err)
		}
	}
	// An authority that the environment names is taken, or a broken one refused.
	ca, err := pki.NewCA("object store", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert, _, err := ca.Encode()
	if err != nil {
		t.Fatal(err)
	}
	bundle := filepath.Join(t.TempDir(), "ca.pem")
	for content, works := range map[string]bool{string(cert): true, "nonsense": false} {
		if err := os.WriteFile(bundle, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("AWS_CA_BUNDLE", bundle)
		if _, err := s3blob.Open(t.Context(), "s3://bucket"); (err == nil) != works {
			t.Errorf("an authority, good %v: %v", works, err)
		}
	}
	t.Setenv("AWS_CA_BUNDLE", "")
	for _, bad := range []string{"", "bucket", "http://bucket", "s3://", "s3://ab", "s3://Bucket", "s3://key:secret@bucket", "s3://bucket/../x", "s3://bucket/a b", "s3://bucket/.x",
		"s3://bucket?endpoint=ftp://x", "s3://bucket?endpoint=https://u:p@x", "s3://bucket?secret=x", "s3://bucket#x"} {
		if _, err := s3blob.Open(t.Context(), bad); fault.CodeOf(err) != "bad_storage" || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
