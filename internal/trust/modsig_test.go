// SPDX-License-Identifier: Apache-2.0

package trust_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/testkit"
	"klatch/internal/testkit/signed"
	"klatch/internal/trust"
	"klatch/internal/trustsign"
)

// certificate makes a module key with a certificate, as a publisher has it.
func certificate(t *testing.T, bits int, name string, serial *big.Int) (key *rsa.PrivateKey, k trust.ModuleKey, der []byte) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	check(t, err)
	c := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name, Organization: []string{"Klatch tests"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	}
	der, err = x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	check(t, err)
	parsed, err := x509.ParseCertificate(der)
	check(t, err)
	return key, trust.ModuleKey{Name: name, Issuer: parsed.RawIssuer, Serial: signed.Serial(serial), Modulus: key.N.Bytes(), Exponent: key.E}, der
}

// TestSameAsKernel compares our module signature with that of the kernel's
// sign-file, byte for byte, for fifty modules and two sizes of keys, and lets
// OpenSSL verify it. SHA-256 is the only digest that we sign with: SHA-512 is a
// module in Debian's kernel, which may not be there when it is wanted. What
// sign-file makes with the others is refused.
func TestSameAsKernel(t *testing.T) {
	testkit.Need(t, "sign-file")
	for _, bits := range []int{2048, 4096} {
		for name, serial := range map[string]*big.Int{
			"short":                              big.NewInt(1),
			"a name with many letters, and more": new(big.Int).Lsh(big.NewInt(0x81), 144), // 20 bytes with a leading zero
		} {
			t.Run(fmt.Sprintf("RSA %d, serial of %d bits", bits, serial.BitLen()), func(t *testing.T) {
				key, k, der := certificate(t, bits, name, serial)
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
				for i := range 50 {
					module := randomModule(uint64(i))
					file := write("module.ko", module)
					if out, err := exec.Command(testkit.SignFile(), "sha256", keyFile, certFile, file).CombinedOutput(); err != nil {
						t.Fatalf("sign-file: %v\n%s", err, out)
					}
					want, err := os.ReadFile(file)
					check(t, err)
					got, err := trustsign.Module(module, k, key, rand.Reader)
					check(t, err)
					if !bytes.Equal(got, want) {
						t.Fatalf("module %d: %d bytes differ from sign-file's %d", i, len(got), len(want))
					}
					a := trust.Anchor{ModuleKeys: []trust.ModuleKey{k}}
					if body, err := a.VerifyModule(want); err != nil || !bytes.Equal(body, module) {
						t.Errorf("module %d by sign-file does not verify: %v", i, err)
					}
				}
				for _, digest := range []string{"sha384", "sha512"} {
					file := write("module.ko", randomModule(7))
					if out, err := exec.Command(testkit.SignFile(), digest, keyFile, certFile, file).CombinedOutput(); err != nil {
						t.Fatalf("sign-file: %v\n%s", err, out)
					}
					other, err := os.ReadFile(file)
					check(t, err)
					a := trust.Anchor{ModuleKeys: []trust.ModuleKey{k}}
					if _, err := a.VerifyModule(other); fault.CodeOf(err) != "module_key_unknown" {
						t.Errorf("%s by sign-file: %v", digest, err)
					}
				}
				t.Run("OpenSSL verifies it", func(t *testing.T) {
					testkit.Need(t, "openssl")
					opensslVerifies(t, write, certFile, randomModule(99), key, k)
				})
			})
		}
	}
}

func opensslVerifies(t *testing.T, write func(string, []byte) string, certFile string, module []byte, key *rsa.PrivateKey, k trust.ModuleKey) {
	t.Helper()
	whole, err := trustsign.Module(module, k, key, rand.Reader)
	check(t, err)
	_, cms := split(whole)
	out, err := exec.Command("openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", write("cms.der", cms),
		"-content", write("content", module), "-certfile", certFile, "-noverify", "-out", "/dev/null").CombinedOutput()
	if err != nil {
		t.Errorf("openssl: %v\n%s", err, out)
	}
}

func randomModule(seed uint64) []byte {
	r := mathrand.New(mathrand.NewPCG(seed, 1))
	b := make([]byte, 1+r.IntN(64<<10))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// split takes a signed module apart; the trailer has 12 bytes, the line 28.
func split(whole []byte) (module, cms []byte) {
	end := len(whole) - 28 - 12
	size := int(binary.BigEndian.Uint32(whole[end+8:]))
	return whole[:end-size], whole[end-size : end]
}

func join(module, cms []byte) []byte {
	out := slices.Concat(module, cms, []byte{0, 0, 2, 0, 0, 0, 0, 0})
	out = binary.BigEndian.AppendUint32(out, uint32(len(cms)))
	return append(out, "~Module signature appended~\n"...)
}

// TestAttack is the part of group K about module signatures: one encoding is
// right, and whatever a lenient reader would also take is not.
func TestAttack(t *testing.T) {
	p, err := signed.NewPublisher("attacked")
	check(t, err)
	other, err := signed.NewPublisher("attacker")
	check(t, err)
	a := p.Anchor()
	module := randomModule(5)
	good, err := trustsign.Module(module, p.Module, p.Private, rand.Reader)
	check(t, err)
	_, cms := split(good)
	if body, err := a.VerifyModule(good); err != nil || !bytes.Equal(body, module) {
		t.Fatalf("the good one: %v", err)
	}
	if !bytes.Equal(join(module, cms), good) {
		t.Fatal("split and join lose something")
	}
	longer := func(cms []byte, at int) []byte { // the length at this place in a longer form than needed
		n := 1 + int(cms[at]&0x7f)
		out := append(slices.Clone(cms[:at]), byte(0x80|n), 0)
		return append(out, cms[at+1:]...)
	}
	signature := p.Private.Size()
	sha1 := []byte{0x06, 0x05, 0x2b, 0x0e, 0x03, 0x02, 0x1a, 0x05, 0x00, 0x05, 0x00} // as long as SHA-256's
	sha256 := []byte{0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01}
	for _, tc := range []struct {
		name   string
		signed []byte
		code   fault.Code
	}{
		{"empty file", nil, "module_unsigned"},
		{"unsigned", module, "module_unsigned"},
		{"marker cut short", good[:len(good)-1], "module_unsigned"},
		{"bytes after the marker", append(slices.Clone(good), '\n'), "module_unsigned"},
		{"marker alone", []byte("~Module signature appended~\n"), "module_signature_malformed"},
		{"two markers", append(slices.Clone(good), "~Module signature appended~\n"...), "module_signature_malformed"},
		{"two signatures", join(good, cms), "module_signature_malformed"},
		{"length over the file", changed(good, len(good)-28-4, 0x7f), "module_signature_malformed"},
		{"length over the limit", join(module, append(slices.Clone(cms), make([]byte, 17<<10)...)), "module_signature_malformed"},
		{"length of everything", join(nil, cms), "module_signature_malformed"},
		{"signature of nothing", join(module, nil), "module_key_unknown"},
		{"other id type", changed(good, len(good)-28-10, 1), "module_signature_malformed"},
		{"trailer with a hash name", changed(good, len(good)-28-12, 4), "module_signature_malformed"},
		{"trailer padding used", changed(good, len(good)-28-5, 1), "module_signature_malformed"},

		{"byte before the CMS counted in", join(module[:len(module)-1], append([]byte{module[len(module)-1]}, cms...)), "module_key_unknown"},
		{"bytes after the CMS", join(module, append(slices.Clone(cms), 0, 0)), "module_key_unknown"},
		{"BER: longer length", join(module, longer(cms, 1)), "module_key_unknown"},
		{"BER: indefinite length", join(module, slices.Concat([]byte{0x30, 0x80}, cms[4:], []byte{0, 0})), "module_key_unknown"},
		{"BER: version with a leading zero", join(module, bytes.Replace(cms, []byte{2, 1, 1}, []byte{2, 2, 0, 1}, 1)), "module_key_unknown"},
		{"SHA-1 named", join(module, bytes.ReplaceAll(cms, sha256, sha1)), "module_key_unknown"},
		{"SHA-512 named", join(module, bytes.ReplaceAll(cms, sha256, changed(sha256, 10, 3))), "module_key_unknown"},
		{"null parameters of the digest", join(module, bytes.Replace(cms, sha256, append(slices.Clone(sha256), 5, 0), 1)), "module_key_unknown"},
		{"attributes present", join(module, slices.Concat(cms[:len(cms)-signature-4], []byte{0xa0, 0x02, 0x30, 0x00}, cms[len(cms)-signature-4:])), "module_key_unknown"},
		{"second signer", join(module, append(slices.Clone(cms), cms[60:]...)), "module_key_unknown"},
		{"other serial number", join(module, bytes.Replace(cms, []byte{2, 1, 7}, []byte{2, 1, 8}, 1)), "module_key_unknown"},
		{"signature cut", join(module, cms[:len(cms)-1]), "module_key_unknown"},
		{"signature of zeros", join(module, append(slices.Clone(cms[:len(cms)-signature]), make([]byte, signature)...)), "module_signature_bad"},
		{"signature of ones", join(module, append(slices.Clone(cms[:len(cms)-signature]), bytes.Repeat([]byte{0xff}, signature)...)), "module_signature_bad"},
		{"module cut", join(module[:len(module)-1], cms), "module_signature_bad"},
		{"module longer", join(append(slices.Clone(module), 0), cms), "module_signature_bad"},
	} {
		t.Run("K/"+tc.name, func(t *testing.T) {
			_, err := a.VerifyModule(tc.signed)
			if fault.KindOf(err) != fault.Untrusted || fault.CodeOf(err) != tc.code {
				t.Errorf("got %v with code %q, want %q", err, fault.CodeOf(err), tc.code)
			}
		})
	}
	t.Run("K/bit flips", func(t *testing.T) {
		for at := len(module) - 64; at < len(good); at++ { // all of the signature
			if _, err := a.VerifyModule(changed(good, at, good[at]^(1<<(at%8)))); fault.KindOf(err) != fault.Untrusted {
				t.Errorf("byte %d: %v", at, err)
			}
		}
		for i := range 32 {
			at := i * (len(module) - 1) / 31
			if _, err := a.VerifyModule(changed(good, at, good[at]^(1<<(i%8)))); fault.CodeOf(err) != "module_signature_bad" {
				t.Errorf("byte %d: %v", at, err)
			}
		}
	})
	t.Run("K/foreign key", func(t *testing.T) {
		bad, err := trustsign.Module(module, other.Module, other.Private, rand.Reader)
		check(t, err)
		if _, err := a.VerifyModule(bad); fault.CodeOf(err) != "module_key_unknown" {
			t.Errorf("got %v", err)
		}
		disguise := other.Module
		disguise.Issuer, disguise.Serial = p.Module.Issuer, p.Module.Serial
		bad, err = trustsign.Module(module, disguise, other.Private, rand.Reader)
		check(t, err)
		if _, err := a.VerifyModule(bad); fault.CodeOf(err) != "module_signature_bad" {
			t.Errorf("got %v", err)
		}
	})
}

func changed(b []byte, at int, to byte) []byte {
	out := slices.Clone(b)
	out[at] = to
	return out
}

func FuzzVerifyModule(f *testing.F) {
	p, err := signed.NewPublisher("fuzzed")
	check(f, err)
	a := p.Anchor()
	good, err := trustsign.Module([]byte("a module"), p.Module, p.Private, rand.Reader)
	check(f, err)
	f.Add(good)
	f.Add(good[8:])
	f.Add([]byte(strings.Repeat("~Module signature appended~\n", 3)))
	f.Fuzz(func(t *testing.T, b []byte) {
		body, err := a.VerifyModule(b)
		if err == nil && (!bytes.Equal(b, good) || string(body) != "a module") {
			t.Errorf("%q verifies", b)
		}
	})
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
