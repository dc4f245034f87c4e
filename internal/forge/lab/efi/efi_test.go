// SPDX-License-Identifier: Apache-2.0

package efi_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"os"
	"slices"
	"testing"

	"klatch/internal/forge/lab/efi"
	"klatch/internal/testkit"
)

// empty is a flash image as EDK2 begins with: a volume's header, a store's
// header, and 0xff.
func empty() []byte {
	b := bytes.Repeat([]byte{0xff}, 4096)
	copy(b[40:], "_FVH")
	binary.LittleEndian.PutUint16(b[48:], 0x48)
	guid := efi.MustGUID("aaf32c78-947b-439a-a180-2e144ec37792")
	copy(b[0x48:], guid[:])
	binary.LittleEndian.PutUint32(b[0x48+16:], 2048)
	return b
}

func TestGUIDsAreMixed(t *testing.T) {
	g := efi.MustGUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
	if got := hex.EncodeToString(g[:]); got != "61dfe48bca93d211aa0d00e098032b8c" {
		t.Error(got)
	}
}

func TestVariablesAreAddedReplacedAndTakenOut(t *testing.T) {
	flash := empty()
	change := func(v ...efi.Variable) {
		t.Helper()
		var err error
		if flash, err = efi.Change(flash, v...); err != nil {
			t.Fatal(err)
		}
	}
	want := func(names ...string) {
		t.Helper()
		have, err := efi.Variables(flash)
		var got []string
		for _, v := range have {
			got = append(got, v.Name+"="+string(v.Data))
		}
		if err != nil || !slices.Equal(got, names) {
			t.Errorf("got %q, want %q, %v", got, names, err)
		}
	}
	one := func(name, data string) efi.Variable {
		return efi.Variable{Name: name, Vendor: efi.Global, Attributes: 7, Data: []byte(data)}
	}
	change(one("A", "1"), one("B", "22"))
	want("A=1", "B=22")
	change(one("A", "333"))
	want("B=22", "A=333")
	change(efi.Variable{Name: "A", Vendor: efi.ShimLock, Data: []byte("x")}) // another vendor's
	want("B=22", "A=333", "A=x")
	change(one("B", ""))
	want("A=333", "A=x")
	if !bytes.Equal(flash[:0x48], empty()[:0x48]) || !bytes.Equal(flash[2200:], empty()[2200:]) {
		t.Error("something outside of the store changed")
	}
	if _, err := efi.Change(flash, one("C", string(make([]byte, 2000)))); err == nil {
		t.Error("more than the store holds was taken")
	}
}

// TestOVMF reads what EDK2's own tools wrote.
func TestOVMF(t *testing.T) {
	testkit.Need(t, "ovmf")
	b, err := os.ReadFile("/usr/share/OVMF/OVMF_VARS_4M.ms.fd")
	if err != nil {
		t.Fatal(err)
	}
	have, err := efi.Variables(b)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"PK", "KEK", "db", "dbx"} {
		if !slices.ContainsFunc(have, func(v efi.Variable) bool { return v.Name == name && v.Attributes == 0x27 }) {
			t.Errorf("no %s among %d variables", name, len(have))
		}
	}
	same, err := efi.Change(b)
	if err != nil {
		t.Fatal(err)
	}
	again, err := efi.Variables(same)
	if err != nil || !slices.EqualFunc(have, again, func(a, b efi.Variable) bool {
		return a.Name == b.Name && a.Vendor == b.Vendor && a.Attributes == b.Attributes && bytes.Equal(a.Data, b.Data)
	}) {
		t.Errorf("written again: %d variables, were %d, %v", len(again), len(have), err)
	}
}

func FuzzVariables(f *testing.F) {
	full, err := efi.Change(empty(), efi.Keys([]byte("platform"), []byte("db"))...)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(empty())
	f.Add(full)
	f.Fuzz(func(t *testing.T, b []byte) {
		have, err := efi.Variables(b)
		if err != nil {
			return
		}
		if out, err := efi.Change(b, efi.Variable{Name: "x", Vendor: efi.Global}); err == nil {
			if again, err := efi.Variables(out); err != nil || len(again) > len(have) {
				t.Errorf("%d variables, then %d, %v", len(have), len(again), err)
			}
		}
	})
}

func FuzzSigners(f *testing.F) {
	f.Add([]byte("MZ"))
	if b, err := os.ReadFile("/usr/lib/shim/shimx64.efi"); err == nil {
		f.Add(b[:4096])
	}
	f.Fuzz(func(t *testing.T, b []byte) { _, _ = efi.Signers(b) })
}
