// SPDX-License-Identifier: Apache-2.0

package bootkeys

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"klatch/internal/durable"
)

// Switch is on, off or unknown.
type Switch string

// The positions of a switch.
const (
	On       Switch = "on"
	Off      Switch = "off"
	NotKnown Switch = "unknown"
)

// Firmware is what the machine was started by.
type Firmware struct {
	SecureBoot Switch
	DB, DBX    List
	MOK        List // what shim shows of the owner's list
	IgnoreDB   bool // shim was told that the kernel shall not believe db
	// Distribution has built the running kernel, so that the keys in it are
	// known to be the distribution's alone; empty where that is not known.
	Distribution string
	Problems     []string // what could not be read
}

const efivars = "sys/firmware/efi/efivars"

// Vendors in the names of variables.
const (
	global        = "-8be4df61-93ca-11d2-aa0d-00e098032b8c"
	imageSecurity = "-d719b2cb-3d3a-4596-a3bc-dad00e67656f"
	shimLock      = "-605dab50-e046-4300-abb6-3dd810dd8b23"
)

// distributions have a word in the kernel's banner that only their own builds
// carry, and take the firmware's keys for modules: each was measured.
var distributions = map[string]string{"(debian-kernel@lists.debian.org)": "Debian"}

// Read looks below a root folder: "/" on a machine, a captured tree in tests.
// The kernel lets users without rights read a hundred variables in a second
// (fs/efivarfs/file.c); these are six.
func Read(root string) Firmware {
	r := reader{root: root}
	f := Firmware{SecureBoot: NotKnown}
	if banner, err := r.file("proc/version", 4<<10); err == nil {
		for word, name := range distributions {
			if strings.Contains(string(banner), word) {
				f.Distribution = name
			}
		}
	}
	if _, err := os.Stat(filepath.Join(root, "sys/firmware/efi")); errors.Is(err, fs.ErrNotExist) {
		f.SecureBoot = Off // started without UEFI: there are no keys of a firmware
		return f
	} else if err != nil {
		f.Problems = append(f.Problems, err.Error())
		return f
	}
	secure, there := r.variable("SecureBoot" + global)
	unchecked, _ := r.variable("MokSBStateRT" + shimLock)
	switch {
	case len(secure) == 1 && secure[0] == 1 && (len(unchecked) != 1 || unchecked[0] != 1):
		f.SecureBoot = On
	case len(secure) == 1:
		f.SecureBoot = Off // of itself, or by the owner's word to shim
	case !there:
		// A firmware has some variables, if not this one.
		if some, err := os.ReadDir(filepath.Join(root, efivars)); err == nil && len(some) > 0 {
			f.SecureBoot = Off
		} else {
			r.problems = append(r.problems, "the firmware's variables are not at /"+efivars)
		}
	}
	_, f.IgnoreDB = r.variable("MokIgnoreDB" + shimLock)
	f.DB, f.DBX, f.MOK = r.list("db"+imageSecurity), r.list("dbx"+imageSecurity), r.list("MokListRT"+shimLock)
	f.Problems = append(f.Problems, r.problems...)
	return f
}

type reader struct {
	root     string
	problems []string
}

func (r *reader) file(rel string, limit int64) ([]byte, error) {
	f, err := os.Open(filepath.Join(r.root, rel))
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	return durable.ReadLimited(f, f.Name(), limit)
}

// variable is the value without the four bytes of attributes before it. A
// variable that is not there is no problem; one that cannot be read is.
func (r *reader) variable(name string) (value []byte, there bool) {
	b, err := r.file(efivars+"/"+name, maxVariable)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, false
	case err != nil:
		r.problems = append(r.problems, err.Error())
		return nil, true
	case len(b) < 4:
		r.problems = append(r.problems, fmt.Sprintf("%s has %d bytes", name, len(b)))
		return nil, true
	}
	return b[4:], true
}

func (r *reader) list(name string) List {
	b, _ := r.variable(name)
	l, err := ParseList(b)
	if err != nil {
		r.problems = append(r.problems, fmt.Sprintf("%s: %v", name, err))
	}
	return l
}
