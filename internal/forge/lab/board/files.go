// SPDX-License-Identifier: Apache-2.0

package board

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"regexp"
	"strings"
	"time"

	"klatch/internal/forge/lab"
)

// Limits of what goes to the board.
const (
	maxOneFile = 64 << 20
	maxFiles   = 256 << 20
)

// Names go through a shell on the board, so they are plain.
var fileName = regexp.MustCompile(`^[A-Za-z0-9._+@,/-]+$`)

func checkFile(f lab.File) (size int64, err error) {
	if !fs.ValidPath(f.Name) || f.Name == "." || !fileName.MatchString(f.Name) {
		return 0, fmt.Errorf("file %q for the board: not a plain relative path", f.Name)
	}
	size = int64(len(f.Data))
	if f.Source != "" {
		st, err := os.Stat(f.Source)
		if err != nil {
			return 0, err
		}
		if !st.Mode().IsRegular() {
			return 0, fmt.Errorf("%s is not a file", f.Source)
		}
		size = st.Size()
	}
	if size > maxOneFile {
		return 0, fmt.Errorf("file %q for the board has %d bytes, at most %d", f.Name, size, maxOneFile)
	}
	return size, nil
}

// putFiles brings the files of the spec to the board, those that it has
// already left out: on a slow line they take long, and a disk keeps them.
func (m *machine) putFiles(ctx context.Context) error {
	has, err := m.digests(ctx)
	if err != nil {
		return err
	}
	for _, f := range m.spec.Files {
		content := f.Data
		if f.Source != "" {
			if content, err = os.ReadFile(f.Source); err != nil {
				return err
			}
		}
		mode := f.Mode.Perm()
		if mode == 0 {
			mode = 0o644
		}
		sum := sha256.Sum256(content)
		key := fmt.Sprintf("%s %o", hex.EncodeToString(sum[:]), mode)
		if has[f.Name] == key {
			delete(has, f.Name)
			continue
		}
		delete(has, f.Name)
		if _, err := m.sh(ctx, "mkdir -p "+path.Dir(path.Join(lab.FilesDir, f.Name))); err != nil {
			return err
		}
		if err := m.client.Put(ctx, path.Join(lab.FilesDir, f.Name), mode, bytes.NewReader(content)); err != nil {
			return err
		}
	}
	for name := range has { // left by somebody else
		if _, err := m.run(ctx, lab.Command{Argv: []string{"rm", "-f", "--", path.Join(lab.FilesDir, name)}}); err != nil {
			return err
		}
	}
	return nil
}

// digests says what is below FilesDir: by name, the SHA-256 and the mode.
func (m *machine) digests(ctx context.Context) (map[string]string, error) {
	out, err := m.run(ctx, lab.Command{Argv: []string{"sh", "-c", `mkdir -p ` + lab.FilesDir + ` && cd ` + lab.FilesDir + ` &&
find . -type f -exec sha256sum {} + && echo modes && find . -type f -exec stat -c '%a %n' {} +`}, Timeout: 5 * time.Minute, MaxOutput: 8 << 20})
	if err != nil {
		return nil, err
	}
	sums, modes, ok := strings.Cut(out, "modes\n")
	if !ok {
		return nil, errors.New("the board does not say which files it has")
	}
	has := map[string]string{}
	for line := range strings.Lines(modes) {
		if mode, name, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			has[strings.TrimPrefix(name, "./")] = mode
		}
	}
	for line := range strings.Lines(sums) {
		if sum, name, ok := strings.Cut(strings.TrimSpace(line), "  "); ok {
			name = strings.TrimPrefix(name, "./")
			has[name] = sum + " " + has[name]
		}
	}
	return has, nil
}

// putImage brings the kernel of the spec to the board.
func (m *machine) putImage(ctx context.Context) error {
	f, err := os.Open(m.spec.Kernel)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	return m.client.Put(ctx, chosenImage, 0o600, f)
}
