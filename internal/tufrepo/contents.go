// SPDX-License-Identifier: Apache-2.0

package tufrepo

import (
	"encoding/hex"
	"path"
	"path/filepath"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// Contents is what clients get now.
type Contents struct {
	dir  string
	have have
}

// Open reads what is published.
func Open(dir string) (Contents, error) {
	h, err := newDisk(dir, nil).load()
	return Contents{dir, h}, err
}

// Read gives the content of a published target. NotFound means that the
// metadata does not name it.
func (c Contents) Read(name string, limit int64) ([]byte, error) {
	var f *metadata.TargetFiles
	for _, l := range c.have.lists {
		if t := l.meta.Signed.Targets[name]; t != nil {
			f = t
		}
	}
	if f == nil {
		return nil, fault.New(fault.NotFound, "target_missing", "target %.160q is not published", name)
	}
	sum := hex.EncodeToString(f.Hashes["sha256"])
	b, err := durable.ReadFile(filepath.Join(c.dir, "targets", filepath.FromSlash(path.Dir(name)), sum+"."+path.Base(name)), limit)
	if err == nil && digest(b) != sum {
		err = fault.New(fault.Untrusted, "target_digest", "target %s is not the file that was published", name)
	}
	return b, err
}
