// SPDX-License-Identifier: Apache-2.0

package livepatch_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/signed"
)

// raw writes a manifest without asking whether it is a good one, as a
// publisher's broken or hostile program would.
func raw(t *testing.T, m livepatch.Manifest) []byte {
	t.Helper()
	b, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return append(b, '\n')
}

// TestManifestsThatAreRefused: a signature does not make a manifest good; each
// part is looked at before anybody acts on it.
func TestManifestsThatAreRefused(t *testing.T) {
	good := func() livepatch.Manifest {
		m := signed.Manifest(kernel.Build{Distro: "debian-12", Arch: kernel.AMD64, Release: "6.1.0-50-amd64", ID: kernel.BuildID{1}}, 3, []byte("module"))
		m.Fixes = []livepatch.Fix{{CVE: "CVE-2026-0001", Check: livepatch.Passed}}
		return m
	}
	if _, err := livepatch.ParseManifest(raw(t, good())); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*livepatch.Manifest){
		"another format":           func(m *livepatch.Manifest) { m.Format = "klatch-manifest/2" },
		"no build id":              func(m *livepatch.Manifest) { m.Kernel.ID = kernel.BuildID{} },
		"no distro":                func(m *livepatch.Manifest) { m.Kernel.Distro = "" },
		"sequence 0":               func(m *livepatch.Manifest) { m.Sequence, m.Module.Name = 0, "klatch_0" },
		"name of another sequence": func(m *livepatch.Manifest) { m.Module.Name = "klatch_4" },
		"a foreign name":           func(m *livepatch.Manifest) { m.Module.Name = "kpatch_3" },
		"no bytes":                 func(m *livepatch.Manifest) { m.Module.Bytes = 0 },
		"negative bytes":           func(m *livepatch.Manifest) { m.Module.Bytes = -1 },
		"too many bytes":           func(m *livepatch.Manifest) { m.Module.Bytes = livepatch.MaxModule + 1 },
		"a short SHA-256":          func(m *livepatch.Manifest) { m.Module.SHA256 = m.Module.SHA256[:63] },
		"SHA-512 in capitals":      func(m *livepatch.Manifest) { m.Module.SHA512 = strings.ToUpper(m.Module.SHA512) },
		"no function":              func(m *livepatch.Manifest) { m.Functions = nil },
		"a function of no name":    func(m *livepatch.Manifest) { m.Functions = []livepatch.Function{{Object: "vmlinux", Name: "a b"}} },
		"an object with a path":    func(m *livepatch.Manifest) { m.Functions = []livepatch.Function{{Object: "../x", Name: "f"}} },
		"an unknown check":         func(m *livepatch.Manifest) { m.Fixes[0].Check = "surely" },
		"a fix twice":              func(m *livepatch.Manifest) { m.Fixes = append(m.Fixes, m.Fixes[0]) },
	} {
		m := good()
		spoil(&m)
		if _, err := livepatch.ParseManifest(raw(t, m)); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	text := raw(t, good())
	for name, b := range map[string][]byte{
		"a field twice":     bytes.Replace(text, []byte(`"sequence": 3`), []byte(`"sequence": 9, "sequence": 3`), 1),
		"another spelling":  bytes.Replace(text, []byte(`"sequence"`), []byte(`"Sequence"`), 1),
		"more white space":  bytes.Replace(text, []byte(`"sequence": 3`), []byte(`"sequence":  3`), 1),
		"an escaped letter": bytes.Replace(text, []byte("debian-12"), []byte(`debi\u0061n-12`), 1),
		"bytes at the end":  append(bytes.Clone(text), '\n'),
	} {
		if _, err := livepatch.ParseManifest(b); fault.CodeOf(err) != "manifest_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBundleLimits(t *testing.T) {
	good := livepatch.Bundle{Manifest: []byte("a"), Module: []byte("b")}.Encode()
	for name, b := range map[string][]byte{
		"too long":                     append(bytes.Clone(good), make([]byte, livepatch.MaxBundle)...),
		"a manifest over its limit":    livepatch.Bundle{Manifest: make([]byte, livepatch.MaxManifest+1), Module: []byte("b")}.Encode(),
		"a member longer than is left": append(bytes.Clone(good[:len(good)-2]), 200, 'b'),
		"a byte at the end":            append(bytes.Clone(good), 0),
	} {
		if _, err := livepatch.ParseBundle(b); fault.CodeOf(err) != "bundle_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := livepatch.ParseBundle(make([]byte, livepatch.MaxBundle+1))
	if err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("the size is not looked at first: %v", err)
	}
}
