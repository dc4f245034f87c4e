// SPDX-License-Identifier: Apache-2.0

package repo_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/logsim"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/translog"
	"klatch/internal/tufrepo"
)

// logging is a publisher whose every livepatch is in its log.
type logging struct {
	*pubsim.Publisher
	log *logsim.Log
}

func newLogging(t *testing.T) *logging {
	p := &logging{pubsim.New(t, "acme", start), logsim.New(t, "acme/log", 1)}
	p.Anchor.LogPolicy = p.log.Policy(1)
	return p
}

func (p *logging) release(now time.Time, s livepatch.Sequence) {
	m, b := p.Bundle(stock, s, "CVE-2026-0001")
	i := p.log.Add(m.TargetPath(), b.Encode())
	p.show(p.log)
	p.Publish(now, tufrepo.Target{Path: m.TargetPath(), Content: b.Encode()},
		tufrepo.Target{Path: translog.ProofPath(m.TargetPath()), Content: p.log.Proof(i, 0).Encode()})
}

func (p *logging) show(l *logsim.Log) {
	for name, content := range l.Files() {
		p.Write(name, content)
	}
	p.Write(path.Join(translog.Folder(l.Key), translog.CosignedFile), l.Cosign(l.Whole().Checkpoint.Signed, 0))
}

// served is the log as machines get it from the copy.
func (m *mirror) served(l *logsim.Log) (*translog.Log, error) {
	m.t.Helper()
	s := httptest.NewServer(m.Handler())
	m.t.Cleanup(s.Close)
	snapshot, err := m.machine(start)
	if err != nil {
		return nil, err
	}
	read := func(ctx context.Context, name string, limit int64) ([]byte, error) {
		return snapshot.Static(ctx, path.Join(translog.Folder(l.Key), name), limit)
	}
	policy, err := translog.ParsePolicy(l.Policy(1))
	if err != nil {
		return nil, err
	}
	signed, err := read(m.t.Context(), translog.CheckpointFile, translog.MaxCheckpoint)
	if err != nil {
		return nil, err
	}
	head, err := policy.OpenUnwitnessed(signed)
	if err != nil {
		return nil, err
	}
	whole, err := translog.ReadLog(m.t.Context(), read, head)
	if err == nil {
		err = whole.CheckFiles(m.t.Context(), read)
	}
	return whole, err
}

func TestTheLogTravelsWithTheRepository(t *testing.T) {
	p := newLogging(t)
	p.release(start, 1)
	m := newMirror(t, p.Publisher)
	if _, err := m.sync(start); err != nil {
		t.Fatal(err)
	}
	if whole, err := m.served(p.log); err != nil || len(whole.Entries) != 1 {
		t.Fatalf("%+v, %v", whole, err)
	}
	for i := range 300 { // a full tile, and another begun
		p.log.Add("other/"+strings.Repeat("x", i+1), nil)
	}
	p.release(start, 2)
	if _, err := m.sync(start.Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	whole, err := m.served(p.log)
	if err != nil || len(whole.Entries) != 302 {
		t.Fatalf("%v, %v", whole, err)
	}
	dir := filepath.Join(m.dir, translog.Folder(p.log.Key))
	if left, _ := filepath.Glob(filepath.Join(dir, "tile/0/000.p/*")); len(left) != 0 {
		t.Errorf("partial tiles are left: %v", left)
	}
	cosigned, err := os.ReadFile(filepath.Join(dir, translog.CosignedFile))
	if err != nil || !strings.Contains(string(cosigned), "witness.example/w1") {
		t.Errorf("cosigned checkpoint %q, %v", cosigned, err)
	}
	// A damaged copy is made whole at the next change.
	if err := os.WriteFile(filepath.Join(dir, "tile/entries/000"), []byte("damaged"), 0o644); err != nil {
		t.Fatal(err)
	}
	p.release(start, 3)
	if _, err := m.sync(start.Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := m.served(p.log); err != nil {
		t.Error(err)
	}
}

// TestAnEmptyLogIsCopied: its publisher died before the first entry.
func TestAnEmptyLogIsCopied(t *testing.T) {
	p := newLogging(t)
	p.show(p.log)
	p.Publish(start)
	m := newMirror(t, p.Publisher)
	if _, err := m.sync(start); err != nil {
		t.Fatal(err)
	}
	if whole, err := m.served(p.log); err != nil || len(whole.Entries) != 0 {
		t.Errorf("%+v, %v", whole, err)
	}
}

// TestALogIsCopiedOnceTheAnchorAsksForIt: nothing else is new.
func TestALogIsCopiedOnceTheAnchorAsksForIt(t *testing.T) {
	p := newLogging(t)
	policy := p.Anchor.LogPolicy
	p.Anchor.LogPolicy = ""
	p.release(start, 1)
	m := newMirror(t, p.Publisher)
	if _, err := m.sync(start); err != nil {
		t.Fatal(err)
	}
	if _, err := m.served(p.log); fault.KindOf(err) != fault.NotFound {
		t.Errorf("an anchor without a log: %v", err)
	}
	p.Anchor.LogPolicy = policy
	if r, err := m.sync(start.Add(time.Minute)); err != nil || r.Changed {
		t.Fatalf("%+v, %v", r, err)
	}
	if _, err := m.served(p.log); err != nil {
		t.Error(err)
	}
}

// TestAttack/T: a source with all keys shows the server another log. The fleet
// keeps seeing the old state, livepatches and log alike.
func TestAttack(t *testing.T) {
	for _, tt := range []struct {
		name string
		code fault.Code
		evil func(p *logging)
	}{
		{"another history", translog.CodeInconsistent, func(p *logging) { p.log.Entries[0].Bytes++ }},
		{"size shrink", translog.CodeRollback, func(p *logging) { p.log.Entries = nil }},
		{"bad log key", translog.CodeUntrusted, func(p *logging) {
			key := p.log.Key
			p.log.UseKey(logsim.Secret(t, p.log.Origin))
			p.log.Key = key // it lies where the other one did
		}},
	} {
		t.Run("T/a server is shown "+tt.name, func(t *testing.T) {
			p := newLogging(t)
			p.release(start, 1)
			p.release(start, 2)
			m := newMirror(t, p.Publisher)
			if _, err := m.sync(start); err != nil {
				t.Fatal(err)
			}
			before, err := m.served(p.log)
			if err != nil {
				t.Fatal(err)
			}
			honest := p.log.Fork()
			tt.evil(p)
			p.release(start, 3)
			if _, err := m.sync(start.Add(time.Minute)); fault.CodeOf(err) != tt.code {
				t.Errorf("%v, want %s", err, tt.code)
			}
			after, err := m.served(honest)
			if err != nil || after.Checkpoint.Root != before.Checkpoint.Root {
				t.Errorf("the log changed to %v, %v", after, err)
			}
			if strings.Contains(m.targets(), "klatch_3") {
				t.Error("livepatch 3 is offered")
			}
		})
	}
}

// TestOnlyTheLogsOwnFilesAreServed: no lock, no state of the writer.
func TestOnlyTheLogsOwnFilesAreServed(t *testing.T) {
	p := newLogging(t)
	p.release(start, 1)
	m := newMirror(t, p.Publisher)
	if _, err := m.sync(start); err != nil {
		t.Fatal(err)
	}
	folder := "/" + translog.Folder(p.log.Key)
	for name, want := range map[string]int{
		"/checkpoint": 200, "/cosigned": 200, "/tile/0/000.p/1": 200, "/tile/entries/000.p/1": 200,
		"/tile/0/001": 404, "/.lock": 404, "/.state/treeState": 404, "/": 404, "": 404, "/tile/0/../../checkpoint": 404, "/tile/0/000.p": 404,
	} {
		if strings.HasPrefix(name, "/.") {
			file := filepath.Join(m.dir, folder, name)
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://x"+folder+name, nil)
		w := httptest.NewRecorder()
		m.Handler().ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("%s: status %d, want %d", name, w.Code, want)
		}
		if cached := w.Header().Get("Cache-Control"); want == 200 && strings.Contains(cached, "immutable") != strings.Contains(name, "tile") {
			t.Errorf("%s: %s", name, cached)
		}
	}
}
