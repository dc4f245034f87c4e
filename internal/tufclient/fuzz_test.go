// SPDX-License-Identifier: Apache-2.0

package tufclient_test

import (
	"bytes"
	"crypto"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/testkit/tufsim"
	"klatch/internal/tufclient"
	"klatch/internal/tufrepo"
)

// FuzzRefresh shows a machine any bytes in the place of one metadata file.
// First as they are: whatever the bytes, it says why it refuses or sees what
// the publisher signed, and nothing else. Then signed by the role's own keys,
// so that the readers behind the signature get them too: it must not panic, and
// its time and versions must not go back.
func FuzzRefresh(f *testing.F) {
	r := tufsim.New(f, "good", start)
	r.Delegate(start, "debian-12", "amd64")
	r.Publish(start, tufrepo.Target{Path: firstPath, Content: []byte("1"), Custom: json.RawMessage(`{"sequence":1}`)})
	names := []string{"timestamp.json", "2.snapshot.json", "1.targets.json", "2." + releaseFile, "2.root.json"}
	keys := [][]crypto.Signer{r.Keys.Timestamp.Signers, r.Keys.Snapshot.Signers, r.Keys.Targets.Signers[:2], r.Keys.Release.Signers[:2], r.Keys.Root.Signers[:2]}
	for i, n := range names[:4] {
		f.Add(uint8(i), false, r.Read("metadata/"+n))
		f.Add(uint8(i), true, r.Read("metadata/"+n))
	}
	f.Add(uint8(4), true, r.Read("metadata/1.root.json"))
	f.Add(uint8(0), true, []byte(`{"signed":{"_type":"timestamp","version":3,"spec_version":"1.0.31","expires":"2026-11-03T12:00:00Z","meta":{}}}`))
	f.Add(uint8(0), false, []byte(`null`))
	honest := tufclient.DirTransport(r.Dir)
	f.Fuzz(func(t *testing.T, which uint8, sign bool, b []byte) {
		i := int(which) % len(names)
		if sign {
			if b = resigned(b, keys[i]); b == nil {
				return
			}
		}
		cfg := tufclient.Config{Root: r.Root, Dir: filepath.Join(t.TempDir(), "tuf"), BaseURL: "file://localhost", Now: start, Client: &http.Client{Transport: honest}}
		before, err := tufclient.Refresh(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Now, cfg.Client = start.Add(time.Minute), &http.Client{Transport: inPlaceOf{honest, names[i], b}}
		s, err := tufclient.Refresh(t.Context(), cfg)
		switch {
		case err != nil && (fault.CodeOf(err) == "" || fault.KindOf(err) == fault.Internal):
			t.Errorf("refused without a code: %v", err)
		case err == nil && !sign && (len(s.Targets()) != 1 || s.Targets()[0].Path != firstPath || s.Targets()[0].SHA256 != before.Targets()[0].SHA256):
			t.Errorf("it sees %+v", s.Targets())
		case err == nil && (s.Timestamp < before.Timestamp || s.Snapshot < before.Snapshot || s.Root < before.Root):
			t.Errorf("it went back from %+v to %+v", before, s)
		}
		// Unless somebody held the keys, the honest repository is good after it.
		if cfg.Client = (&http.Client{Transport: honest}); !sign {
			if _, err := tufclient.Refresh(t.Context(), cfg); err != nil {
				t.Errorf("the honest repository afterwards: %v", err)
			}
		}
	})
}

// inPlaceOf answers with other bytes for one file.
type inPlaceOf struct {
	http.RoundTripper
	name string
	b    []byte
}

func (p inPlaceOf) RoundTrip(q *http.Request) (*http.Response, error) {
	if !strings.HasSuffix(q.URL.Path, "/"+p.name) {
		return p.RoundTripper.RoundTrip(q)
	}
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, ContentLength: int64(len(p.b)), Body: io.NopCloser(bytes.NewReader(p.b)), Request: q}, nil
}

// resigned signs the member "signed" of any JSON object, in the canonical form
// of what it says; nil where there is none.
func resigned(b []byte, keys []crypto.Signer) []byte {
	var m struct {
		Signed map[string]any `json:"signed"`
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	if d.Decode(&m) != nil || m.Signed == nil {
		return nil
	}
	text, err := json.Marshal(m.Signed) // sorts the members
	if err != nil {
		return nil
	}
	type sig struct {
		KeyID string `json:"keyid"`
		Sig   string `json:"sig"`
	}
	out := struct {
		Signatures []sig           `json:"signatures"`
		Signed     json.RawMessage `json:"signed"`
	}{Signed: text}
	for _, k := range keys {
		id, err := tufrepo.KeyID(k.Public())
		if err != nil {
			return nil
		}
		s, err := k.Sign(nil, text, crypto.Hash(0))
		if err != nil {
			return nil
		}
		out.Signatures = append(out.Signatures, sig{id, hex.EncodeToString(s)})
	}
	b, err = json.Marshal(out)
	if err != nil {
		return nil
	}
	return b
}
