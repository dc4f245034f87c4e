// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/sandbox"
)

// Limits of a source tree. Linux 7.3 has 95,000 files, 1.6 GB.
const (
	maxTreeFiles = 400_000
	maxTreeBytes = 8 << 30
	maxTreeFile  = 256 << 20
)

// built says whether a file of a kernel tree is left over from a build, and
// so no source: a copy of it would only be removed by make clean.
func built(rel string) bool {
	base := path.Base(rel)
	switch path.Ext(base) {
	case ".o", ".ko", ".a", ".cmd", ".mod", ".order":
		return true
	}
	return strings.HasPrefix(rel, "vmlinux") && !strings.Contains(rel, "/") || rel == "System.map" || rel == ".config" || rel == ".config.old"
}

// skipped folders: history, generated headers (of perhaps another config), and
// what an earlier klp-build left.
var skipped = []string{".git", "klp-tmp", "include/generated", "include/config", "arch/x86/include/generated"}

// secret says whether a file may hold a private key: kernel trees keep the one
// that signs modules.
func secret(rel string, content []byte) bool {
	return strings.HasPrefix(rel, "certs/signing_key") || bytes.Contains(content, []byte("PRIVATE KEY-----"))
}

// copySource copies a source tree for the build user and returns the digest
// of names, modes and contents, and the number of files.
func copySource(from, to string) (digest string, files int, err error) {
	h := sha256.New()
	var total int64
	if from, err = filepath.Abs(from); err != nil {
		return "", 0, err
	}
	if from, err = filepath.EvalSymlinks(from); err != nil {
		return "", 0, err
	}
	err = filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		switch {
		case d.IsDir():
			if slices.Contains(skipped, rel) {
				return filepath.SkipDir
			}
			if err := os.MkdirAll(target, 0o755); err != nil {
				return err
			}
			return sandbox.Own(target)
		case built(rel):
			return nil
		case d.Type()&fs.ModeSymlink != 0:
			return copyLink(p, rel, target, h)
		case !d.Type().IsRegular():
			return nil
		}
		if files++; files > maxTreeFiles {
			return fault.New(fault.Invalid, "tree_too_large", "source tree has over %d files", maxTreeFiles)
		}
		n, err := copyFile(p, rel, target, h)
		if total += n; err == nil && total > maxTreeBytes {
			err = fault.New(fault.Invalid, "tree_too_large", "source tree has over %d bytes", int64(maxTreeBytes))
		}
		return err
	})
	return hex.EncodeToString(h.Sum(nil)), files, err
}

func copyFile(p, rel, target string, h io.Writer) (int64, error) {
	b, err := durable.ReadFile(p, maxTreeFile)
	if err != nil {
		return 0, err
	}
	if secret(rel, b) {
		return 0, nil
	}
	st, err := os.Stat(p)
	if err != nil {
		return 0, err
	}
	mode := fs.FileMode(0o644)
	if st.Mode()&0o111 != 0 {
		mode = 0o755
	}
	if _, err := fmt.Fprintf(h, "%s %o %d\n%s", rel, mode, len(b), b); err != nil {
		return 0, err
	}
	if err := os.WriteFile(target, b, mode); err != nil { //nolint:forbidigo // the marker comes last
		return 0, err
	}
	return int64(len(b)), sandbox.Own(target)
}

// copyLink copies a link that stays in the tree and leaves others out, such as
// those that a build in a folder of its own makes.
func copyLink(p, rel, target string, h io.Writer) error {
	to, err := os.Readlink(p)
	if err != nil {
		return err
	}
	if filepath.IsAbs(to) || strings.HasPrefix(path.Join(path.Dir(rel), to), "..") {
		return nil
	}
	if _, err := fmt.Fprintf(h, "%s -> %s\n", rel, to); err != nil {
		return err
	}
	if err := os.Symlink(to, target); err != nil {
		return err
	}
	return sandbox.Own(target)
}
