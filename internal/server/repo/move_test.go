// SPDX-License-Identifier: Apache-2.0

package repo_test

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/server/blob"
	"klatch/internal/server/blob/fsblob"
	"klatch/internal/server/repo"
	"klatch/internal/testkit/pubsim"
)

// treacherous is a store that fails or lies about one file.
type treacherous struct {
	blob.Store
	name string
	lie  bool
	puts []string
}

func (s *treacherous) Put(ctx context.Context, name string, content []byte, h blob.Header) error {
	s.puts = append(s.puts, name)
	if s.name != "" && strings.Contains(name, s.name) {
		if !s.lie {
			return errors.New("disk full")
		}
		content = append([]byte("x"), content[1:]...)
	}
	return s.Store.Put(ctx, name, content, h)
}

func TestAMoveIsWholeOrNotAtAll(t *testing.T) {
	p := newLogging(t)
	p.release(start, 1)
	p.Release(start, nearby, 1)
	m := newMirror(t, p.Publisher)
	m.rules.Filter.Kernels = []string{"6.1.0-50-*"}
	to := &treacherous{Store: fsblob.New(filepath.Join(t.TempDir(), "new"))}
	committed := 0
	move := func() (int, error) {
		return m.MoveTo(t.Context(), to, nil, func() error { committed++; return nil }, start)
	}
	if n, err := move(); n != 0 || err != nil || committed != 1 {
		t.Errorf("nothing to move yet: %d, %v", n, err)
	}
	if _, err := m.sync(start); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []treacherous{{name: "klatch_1.lpb"}, {name: "klatch_1.lpb", lie: true}, {name: "snapshot.json", lie: true}, {name: "timestamp.json"}} {
		to.name, to.lie = bad.name, bad.lie
		if _, err := move(); err == nil || committed != 1 || bad.lie && fault.CodeOf(err) != "storage_lies" {
			t.Errorf("%s, lie %v: committed %d, %v", bad.name, bad.lie, committed, err)
		}
	}
	to.name, to.puts = "", nil
	n, err := move()
	if err != nil || committed != 2 || n < 8 {
		t.Fatalf("%d files, %v", n, err)
	}
	// What was there already, whole, was not written again; what was a lie was.
	if len(to.puts) >= n || to.puts[len(to.puts)-1] != "metadata/timestamp.json" {
		t.Errorf("%d of %d written, %q", len(to.puts), n, to.puts)
	}
	there := repo.New(to, filepath.Join(m.data, "upstream"), m.anchor, quiet)
	if err := there.Load(t.Context(), start); err != nil || len(there.Catalog().Entries) != 1 || len(there.Catalog().LeftOut) != 1 || len(there.Catalog().Problems) != 0 {
		t.Errorf("%+v, %v", there.Catalog(), err)
	}

	// Another publisher's repository is not written over.
	other := pubsim.New(t, "foreign", start)
	other.Release(start, stock, 1)
	to.Store, to.puts = fsblob.New(other.Dir), nil
	if _, err := move(); fault.CodeOf(err) != "storage_taken" || len(to.puts) != 0 || committed != 2 {
		t.Errorf("wrote %q, %v", to.puts, err)
	}
}
