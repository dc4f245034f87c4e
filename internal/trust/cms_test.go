// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/testkit"
	"klatch/internal/trust"
)

// TestAttackLenientCMS: signatures of the right key over the right bytes, in
// forms that a general CMS reader takes, as OpenSSL shows, and that the kernel
// or another reader may understand otherwise. Only the one form passes.
func TestAttackLenientCMS(t *testing.T) {
	testkit.Need(t, "openssl")
	key, k, der := certificate(t, 2048, "ours", big.NewInt(77))
	_, _, other := certificate(t, 2048, "ours", big.NewInt(78))
	dir := t.TempDir()
	write := func(file string, b []byte) string {
		path := filepath.Join(dir, file)
		check(t, os.WriteFile(path, b, 0o600))
		return path
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	check(t, err)
	keyFile := write("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}))
	certFile := write("cert.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	more := write("other.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other}))
	module := randomModule(7)
	content := write("module.ko", module)
	a := trust.Anchor{Publisher: "ours", ModuleKeys: []trust.ModuleKey{k}}
	sign := func(t *testing.T, args ...string) []byte {
		t.Helper()
		out := filepath.Join(t.TempDir(), "cms.der")
		args = append([]string{"cms", "-sign", "-binary", "-in", content, "-signer", certFile, "-inkey", keyFile, "-outform", "DER", "-out", out}, args...)
		if text, err := exec.Command("openssl", args...).CombinedOutput(); err != nil {
			t.Fatalf("openssl %q: %v\n%s", args, err, text)
		}
		text, err := exec.Command("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", out, "-content", content,
			"-certfile", certFile, "-noverify", "-out", os.DevNull).CombinedOutput()
		if err != nil {
			t.Fatalf("openssl does not take its own: %v\n%s", err, text)
		}
		b, err := os.ReadFile(out)
		check(t, err)
		return b
	}
	if body, err := a.VerifyModule(join(module, sign(t, "-noattr", "-nocerts", "-md", "sha256"))); err != nil || !bytes.Equal(body, module) {
		t.Errorf("the one form, made by OpenSSL: %v", err)
	}
	for _, tt := range []struct {
		name string
		args []string
	}{
		{"certificate embedded", []string{"-noattr", "-md", "sha256"}},
		{"another certificate embedded", []string{"-noattr", "-md", "sha256", "-nocerts", "-certfile", more}},
		{"attributes that are signed", []string{"-nocerts", "-md", "sha256"}},
		{"SHA-1 by the right key", []string{"-noattr", "-nocerts", "-md", "sha1"}},
		{"SHA-512 by the right key", []string{"-noattr", "-nocerts", "-md", "sha512"}},
		{"another padding", []string{"-noattr", "-nocerts", "-md", "sha256", "-keyopt", "rsa_padding_mode:pss"}},
		{"content inside", []string{"-noattr", "-nocerts", "-md", "sha256", "-nodetach"}},
		{"BER of indefinite length", []string{"-noattr", "-nocerts", "-md", "sha256", "-nodetach", "-stream"}},
	} {
		t.Run("Attack/K/"+tt.name, func(t *testing.T) {
			if _, err := a.VerifyModule(join(module, sign(t, tt.args...))); fault.CodeOf(err) != "module_key_unknown" && fault.CodeOf(err) != "module_signature_malformed" {
				t.Errorf("got %v", err)
			}
		})
	}
}
