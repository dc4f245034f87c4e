// SPDX-License-Identifier: Apache-2.0

package bootkeys_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/lab/efi"
	"klatch/internal/machine/bootkeys"
	"klatch/internal/trust"
)

// publisher is a module key with its certificate; parent may be nil.
type publisher struct {
	key  trust.ModuleKey
	cert *x509.Certificate
	priv *rsa.PrivateKey
}

func newPublisher(t testing.TB, name string, serial int64, parent *publisher) publisher {
	t.Helper()
	priv, err := rsa.GenerateKey(rand.Reader, 2048)
	check(t, err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	signer, by := c, priv
	if parent != nil {
		signer, by = parent.cert, parent.priv
	}
	der, err := x509.CreateCertificate(rand.Reader, c, signer, priv.Public(), by)
	check(t, err)
	cert, err := x509.ParseCertificate(der)
	check(t, err)
	raw, err := asn1.Marshal(cert.SerialNumber)
	check(t, err)
	return publisher{trust.ModuleKey{Name: name, Issuer: cert.RawIssuer, Serial: raw, Modulus: priv.N.Bytes(), Exponent: priv.E}, cert, priv}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

const (
	debian    = "Linux version 6.1.0-50-cloud-amd64 (debian-kernel@lists.debian.org) (gcc-12) #1 SMP Debian 6.1.176-1\n"
	somebody  = "Linux version 6.1.0-50-cloud-amd64 (me@here) (gcc-12) #1 SMP\n"
	vars      = "sys/firmware/efi/efivars/"
	global    = "-8be4df61-93ca-11d2-aa0d-00e098032b8c"
	security  = "-d719b2cb-3d3a-4596-a3bc-dad00e67656f"
	shim      = "-605dab50-e046-4300-abb6-3dd810dd8b23"
	attribute = "\x07\x00\x00\x00"
)

// machine is a captured tree: the value of a file, or of a variable without
// its attributes.
func machine(t *testing.T, banner string, variables map[string]string) string {
	t.Helper()
	root := t.TempDir()
	put := func(name, content string) {
		p := filepath.Join(root, name)
		check(t, os.MkdirAll(filepath.Dir(p), 0o755))
		check(t, os.WriteFile(p, []byte(content), 0o644))
	}
	put("proc/version", banner)
	for name, value := range variables {
		put(vars+name, attribute+value)
	}
	return root
}

// TestVerdicts: what a machine knows of its kernel and its firmware, and the
// verdict that follows. What could not be found out is never good news.
func TestVerdicts(t *testing.T) {
	ours, other := newPublisher(t, "ours", 4711, nil), newPublisher(t, "other", 1, nil)
	child := newPublisher(t, "child", 5, &other)
	namesake := newPublisher(t, "ours", 4711, nil) // issuer and serial of ours, another key
	renewed := ours
	renewed.key.Serial = []byte{2, 1, 9}
	list := func(ps ...publisher) string {
		var certs [][]byte
		for _, p := range ps {
			certs = append(certs, p.cert.Raw)
		}
		return string(efi.SignatureList(certs...))
	}
	garbled := slices.Concat([]byte("0not a certificate"), ours.key.Modulus)
	strict, sure := bootkeys.Kernel{Lockdown: "integrity", Enforced: "yes"}, func(more ...string) map[string]string {
		m := map[string]string{"SecureBoot" + global: "\x01", "db" + security: list(other)}
		for i := 0; i < len(more); i += 2 {
			m[more[i]] = more[i+1]
		}
		return m
	}
	for _, tt := range []struct {
		name   string
		kernel bootkeys.Kernel
		banner string
		vars   map[string]string
		keys   []publisher
		word   bootkeys.Word
		code   fault.Code
		secure bootkeys.Switch
	}{
		{"enrolled in db", strict, debian, sure("db"+security, list(other, ours)), nil, "trusted", "module_key_enrolled", "on"},
		{"enrolled by MOK", strict, debian, sure("MokListRT"+shim, list(ours)), nil, "trusted", "module_key_enrolled", "on"},
		{"not enrolled", strict, debian, sure(), nil, "refused", "module_key_missing", "on"},
		{"lockdown alone asks too", bootkeys.Kernel{Lockdown: "confidentiality", Enforced: "no"}, debian, sure(), nil, "refused", "module_key_missing", "on"},
		{"enforcement alone asks too, without UEFI", bootkeys.Kernel{Lockdown: "none", Enforced: "yes"}, debian, nil, nil, "refused", "module_key_missing", "off"},
		{"nothing asks", bootkeys.Kernel{Lockdown: "none", Enforced: "no"}, debian, nil, nil, "not_enforced", "module_key_not_asked", "off"},
		{"whether anything asks is unknown", bootkeys.Kernel{Lockdown: "unknown", Enforced: "no"}, debian, sure("db"+security, list(ours)), nil, "unknown", "module_key_unknown_kernel", "on"},
		{"enforcement is unknown", bootkeys.Kernel{Lockdown: "none", Enforced: "unknown"}, debian, nil, nil, "unknown", "module_key_unknown_kernel", "off"},
		{"a kernel that somebody built may have the key in it", strict, somebody, sure(), nil, "unknown", "module_key_builtin", "on"},
		{"a kernel that somebody built may not ask the firmware", strict, somebody, sure("db"+security, list(ours)), nil, "unknown", "module_key_other_kernel", "on"},
		{"MOK without Secure Boot does not count", bootkeys.Kernel{Lockdown: "none", Enforced: "yes"}, debian, sure("SecureBoot"+global, "\x00", "MokListRT"+shim, list(ours)), nil, "refused", "module_key_missing", "off"},
		{"shim was told not to verify", bootkeys.Kernel{Lockdown: "none", Enforced: "yes"}, debian, sure("MokSBStateRT"+shim, "\x01", "MokListRT"+shim, list(ours)), nil, "refused", "module_key_missing", "off"},
		{"shim was told to leave db out", strict, debian, sure("db"+security, list(ours), "MokIgnoreDB"+shim, "\x01"), nil, "refused", "module_key_missing", "on"},
		{"the same name with another key", strict, debian, sure("db"+security, list(namesake)), nil, "unknown", "module_key_unread", "on"},
		{"the same key in another certificate", strict, debian, sure("db"+security, list(ours)), []publisher{renewed}, "unknown", "module_key_unread", "on"},
		{"its issuer is enrolled", strict, debian, sure("MokListRT"+shim, list(other)), []publisher{child}, "unknown", "module_key_unread", "on"},
		{"a certificate that is not readable and holds the key", strict, debian, sure("db"+security, string(efi.SignatureList(garbled))), nil, "unknown", "module_key_unread", "on"},
		{"a certificate that is not readable and does not", strict, debian, sure("db"+security, string(efi.SignatureList([]byte("0not a certificate")))), nil, "refused", "module_key_missing", "on"},
		{"one of two keys", strict, debian, sure("db"+security, list(ours)), []publisher{ours, child}, "unknown", "module_key_partly", "on"},
		{"both keys", strict, debian, sure("db"+security, list(ours), "MokListRT"+shim, list(child)), []publisher{ours, child}, "trusted", "module_key_enrolled", "on"},
		{"every key was recalled", strict, debian, sure("db"+security, list(ours)), []publisher{}, "refused", "module_key_none", "on"},
		{"revoked by certificate", strict, debian, sure("db"+security, list(ours), "dbx"+security, list(ours)), nil, "refused", "module_key_revoked", "on"},
		{"revoked by digest", strict, debian, sure("db"+security, list(ours), "dbx"+security,
			string(efi.RevokedCertificate(sha256.Sum256(ours.cert.RawTBSCertificate)))), nil, "refused", "module_key_revoked", "on"},
		{"another is revoked", strict, debian, sure("db"+security, list(ours), "dbx"+security, list(other)), nil, "trusted", "module_key_enrolled", "on"},
		{"the variables are not mounted", strict, debian, map[string]string{"../x": ""}, nil, "unknown", "module_key_unread", "unknown"},
		{"firmware without Secure Boot", bootkeys.Kernel{Lockdown: "none", Enforced: "yes"}, debian, map[string]string{"Boot0000" + global: "x"}, nil, "refused", "module_key_missing", "off"},
		{"db is damaged", strict, debian, sure("db"+security, list(other)[:40]), nil, "unknown", "module_key_unread", "on"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.keys == nil {
				tt.keys = []publisher{ours}
			}
			var keys []trust.ModuleKey
			for _, p := range tt.keys {
				keys = append(keys, p.key)
			}
			f := bootkeys.Read(machine(t, tt.banner, tt.vars))
			v := bootkeys.Judge(tt.kernel, f, keys)
			if v.Word != tt.word || v.Code != tt.code || v.SecureBoot != tt.secure || v.Text == "" {
				t.Errorf("got %+v (problems %q), want %s, %s, Secure Boot %s", v, f.Problems, tt.word, tt.code, tt.secure)
			}
			if help := tt.word == bootkeys.Refused || tt.word == bootkeys.Unknown; help != (v.HowTo == bootkeys.HowTo) {
				t.Errorf("how-to %q", v.HowTo)
			}
		})
	}
}

func TestAnUnreadableVariableIsNoAbsentOne(t *testing.T) {
	root := machine(t, debian, map[string]string{"SecureBoot" + global: "\x01"})
	check(t, os.Mkdir(filepath.Join(root, vars, "MokListRT"+shim), 0o755))
	f := bootkeys.Read(root)
	v := bootkeys.Judge(bootkeys.Kernel{Lockdown: "integrity", Enforced: "yes"}, f, []trust.ModuleKey{newPublisher(t, "ours", 1, nil).key})
	if v.Word != bootkeys.Unknown || len(f.Problems) != 1 || !strings.Contains(f.Problems[0], "MokListRT") {
		t.Errorf("%+v, problems %q", v, f.Problems)
	}
}

func TestParseListLimits(t *testing.T) {
	one := efi.SignatureList([]byte("certificate"))
	with := func(at int, value byte) []byte {
		b := bytes.Clone(one)
		b[at] = value
		return b
	}
	for name, b := range map[string][]byte{
		"cut in its head":            one[:20],
		"cut in its entry":           one[:len(one)-1],
		"longer than it is":          with(16, byte(len(one)+1)),
		"shorter than its head":      with(16, 8),
		"a header longer than it":    with(20, 200),
		"entries without a byte":     with(24, 16),
		"entries of another size":    with(24, 20),
		"a size of nothing":          with(16, 0),
		"over the limit":             bytes.Repeat(one, 20_000),
		"too many lists":             bytes.Repeat(one[:28:28], 5000),
		"too many entries of 1 byte": nil,
	} {
		if name == "too many lists" {
			empty := bytes.Clone(one[:28])
			empty[16], empty[24] = 28, 17
			b = bytes.Repeat(empty, 5000)
		}
		if name == "too many entries of 1 byte" {
			n := 17_000
			b = bytes.Clone(one[:28])
			size := 28 + 17*n
			b[16], b[17], b[18], b[24] = byte(size), byte(size>>8), byte(size>>16), 17
			b = append(b, make([]byte, 17*n)...)
		}
		if l, err := bootkeys.ParseList(b); err == nil {
			t.Errorf("%s: taken: %d certificates, %d others", name, len(l.Certificates), l.Others)
		}
	}
	if l, err := bootkeys.ParseList(append(bytes.Clone(one), one...)); err != nil || len(l.Certificates) != 2 {
		t.Errorf("two good lists: %+v, %v", l, err)
	}
}

// FuzzParseList: a variable is written by whoever has its key, or by a broken
// firmware.
func FuzzParseList(f *testing.F) {
	p := newPublisher(f, "ours", 1, nil)
	f.Add(efi.SignatureList(p.cert.Raw))
	f.Add(append(efi.RevokedCertificate([32]byte{1}), efi.SignatureList(p.cert.Raw, p.cert.Raw)...))
	f.Add(bytes.Repeat([]byte{0xff}, 64))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := bootkeys.ParseList(b)
		if err != nil {
			return
		}
		// Each entry has at least one byte beside its owner.
		if n := len(l.Certificates) + len(l.Revoked) + l.Others; n*17 > len(b) {
			t.Errorf("%d entries in %d bytes", n, len(b))
		}
		for _, c := range l.Certificates {
			if !bytes.Contains(b, c.DER) {
				t.Error("a certificate that was not there")
			}
		}
		bootkeys.Judge(bootkeys.Kernel{Lockdown: "integrity", Enforced: "yes"},
			bootkeys.Firmware{SecureBoot: bootkeys.On, DB: l, MOK: l, DBX: l, Distribution: "Debian"}, []trust.ModuleKey{p.key})
	})
}
