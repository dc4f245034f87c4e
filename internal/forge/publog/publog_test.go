// SPDX-License-Identifier: Apache-2.0

package publog_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/publog"
	"klatch/internal/forge/sign"
	"klatch/internal/forge/witness"
	"klatch/internal/testkit/logsim"
	"klatch/internal/translog"
	"klatch/internal/trust"
	"klatch/internal/tufrepo"
)

const childEnv = "KLATCH_TEST_PUBLISH"

// TestMain is a publisher where a test starts it as a process, to kill it.
func TestMain(m *testing.M) {
	if dir := os.Getenv(childEnv); dir != "" {
		d, err := datadir.Open(dir)
		if err == nil {
			err = publishAll(context.Background(), d, some(40))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	dir, err := os.MkdirTemp("", "klatch-publog-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	templates = dir
	code := m.Run()
	_ = os.RemoveAll(dir) // scratch of this process
	os.Exit(code)
}

var templates string // folder of TestMain

// keys makes a data folder of each profile once: their RSA keys take a while.
var keys = map[trust.Profile]func() (string, error){trust.Lab: makeOnce(trust.Lab), trust.Small: makeOnce(trust.Small)}

func makeOnce(p trust.Profile) func() (string, error) {
	return sync.OnceValues(func() (string, error) {
		dir := filepath.Join(templates, string(p))
		d, err := datadir.Make(dir, datadir.Policy{Publisher: "example.org", Profile: p})
		if err != nil {
			return "", err
		}
		return dir, sign.MakeKeys(context.Background(), d, time.Now())
	})
}

func folder(t testing.TB, p trust.Profile) datadir.Dir {
	t.Helper()
	from, err := keys[p]()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	d, err := datadir.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func withLog(t testing.TB) datadir.Dir {
	t.Helper()
	d := folder(t, trust.Lab)
	if _, err := publog.Init(d, publog.Witnesses{}); err != nil {
		t.Fatal(err)
	}
	return d
}

// some makes targets: bundles, each with a file beside it.
func some(n int) []tufrepo.Target {
	var ts []tufrepo.Target
	for i := range n {
		name := fmt.Sprintf("debian-12/amd64/6.1.0-50/klatch_%d", i+1)
		ts = append(ts, tufrepo.Target{Path: name + ".lpb", Content: fmt.Appendf(nil, "bundle %d", i)},
			tufrepo.Target{Path: name + ".evidence", Content: fmt.Appendf(nil, "evidence %d", i)})
	}
	return ts
}

// publishAll is what package publish does with targets.
func publishAll(ctx context.Context, d datadir.Dir, targets []tufrepo.Target) error {
	l, err := publog.Open(d)
	if err != nil {
		return err
	}
	p, err := l.Add(ctx, tufrepo.Publication{Targets: targets}, ".lpb", &http.Client{})
	if err != nil {
		return err
	}
	keys, err := sign.RepositoryKeys(d, sign.All)
	if err != nil {
		return err
	}
	_, err = tufrepo.Publish(ctx, d.Repository(), p, keys, time.Now())
	return err
}

func mustPublish(t testing.TB, d datadir.Dir, targets []tufrepo.Target) {
	t.Helper()
	if err := publishAll(t.Context(), d, targets); err != nil {
		t.Fatal(err)
	}
}

func anchor(t testing.TB, d datadir.Dir) *trust.Anchor {
	t.Helper()
	b, err := os.ReadFile(d.Anchor())
	if err != nil {
		t.Fatal(err)
	}
	a, err := trust.ParseAnchor(b, true)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func audit(t testing.TB, d datadir.Dir, change func(*publog.Question)) publog.Report {
	t.Helper()
	q := publog.Question{Anchor: anchor(t, d), From: d.Repository(), Now: time.Now()}
	if change != nil {
		change(&q)
	}
	r, err := publog.Audit(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func openLog(t testing.TB, d datadir.Dir) (*publog.Log, *translog.Log) {
	t.Helper()
	l, err := publog.Open(d)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := l.Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return l, whole
}

func TestWhatIsPublishedIsLoggedOnceWithItsProof(t *testing.T) {
	d := withLog(t)
	mustPublish(t, d, some(3))
	_, first := openLog(t, d)
	mustPublish(t, d, some(3)) // the same again
	if _, again := openLog(t, d); string(again.Checkpoint.Signed) != string(first.Checkpoint.Signed) || again.Checkpoint.Size != 6 {
		t.Errorf("the log grew from %d to %d entries", first.Checkpoint.Size, again.Checkpoint.Size)
	}
	mustPublish(t, d, some(5))
	r := audit(t, d, func(q *publog.Question) { q.Kept = first.Checkpoint.Signed })
	if len(r.Findings) != 0 || r.Targets != 10 || r.Proofs != 5 || len(r.Logs) != 1 || r.Logs[0].Size != 10 || r.Logs[0].KeptSize != 6 {
		t.Errorf("audit %+v", r)
	}
	// What cannot be published is not logged either.
	other := some(1)
	other[0].Content = []byte("another bundle 0")
	if err := publishAll(t.Context(), d, other); fault.CodeOf(err) != "target_exists" {
		t.Errorf("another file of the same name: %v", err)
	}
	if _, whole := openLog(t, d); whole.Checkpoint.Size != 10 {
		t.Errorf("the log has %d entries", whole.Checkpoint.Size)
	}
}

// TestKilledAtAnyMoment kills a publisher with SIGKILL again and again, later
// each time. What it leaves is always a repository and a log that an auditor
// accepts, and a run that is left alone completes it without a second entry.
func TestKilledAtAnyMoment(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	killed, kills := 0, 16
	for i := range kills {
		d := withLog(t)
		mustPublish(t, d, some(2))
		run := func(after time.Duration) error {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			cmd := exec.CommandContext(ctx, self)
			cmd.Env = append(os.Environ(), childEnv+"="+d.Path)
			if after > 0 {
				time.AfterFunc(after, cancel)
			}
			cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGKILL) }
			out, err := cmd.CombinedOutput()
			if err != nil && after == 0 {
				return fmt.Errorf("%w: %s", err, out)
			}
			return err
		}
		if run(time.Duration(i+1)*15*time.Millisecond) != nil {
			killed++
		}
		// Entries may be in the log that are not offered yet: a file is logged
		// before it is published, never after.
		for _, f := range audit(t, d, nil).Findings {
			if f.Code != publog.CodeUnknown {
				t.Errorf("after a kill: %+v", f)
			}
		}
		if err := run(0); err != nil {
			t.Fatal(err)
		}
		if r := audit(t, d, nil); len(r.Findings) != 0 || r.Logs[0].Size != 80 || r.Proofs != 40 {
			t.Errorf("completed: %+v", r)
		}
	}
	if killed < 4 {
		t.Errorf("%d of %d runs were killed before they were done", killed, kills)
	}
}

func TestAuditFinds(t *testing.T) {
	for _, tt := range []struct {
		name string
		code fault.Code
		do   func(t *testing.T, d datadir.Dir, q *publog.Question)
	}{
		{"a file that was never logged", publog.CodeNotLogged, func(t *testing.T, d datadir.Dir, _ *publog.Question) {
			keys, err := sign.RepositoryKeys(d, sign.All)
			if err == nil {
				_, err = tufrepo.Publish(t.Context(), d.Repository(), tufrepo.Publication{Targets: some(4)[6:]}, keys, time.Now())
			}
			if err != nil {
				t.Fatal(err)
			}
		}},
		{"a file that is offered to nobody we know", publog.CodeUnknown, func(t *testing.T, d datadir.Dir, _ *publog.Question) {
			l, _ := openLog(t, d)
			if _, err := l.Add(t.Context(), tufrepo.Publication{Targets: some(9)[16:]}, ".lpb", nil); err != nil {
				t.Fatal(err)
			}
		}},
		{"an entry that was changed", translog.CodeTiles, func(t *testing.T, d datadir.Dir, _ *publog.Question) {
			l, _ := openLog(t, d)
			spoil(t, filepath.Join(l.Dir, "tile/entries/000.p/6"))
		}},
		{"a hash that was changed", translog.CodeTiles, func(t *testing.T, d datadir.Dir, _ *publog.Question) {
			l, _ := openLog(t, d)
			spoil(t, filepath.Join(l.Dir, "tile/0/000.p/6"))
		}},
		{"a tile that is not there", translog.CodeTiles, func(t *testing.T, d datadir.Dir, _ *publog.Question) {
			l, _ := openLog(t, d)
			if err := os.Remove(filepath.Join(l.Dir, "tile/entries/000.p/6")); err != nil {
				t.Fatal(err)
			}
		}},
		{"a history other than the one that was kept", translog.CodeInconsistent, func(t *testing.T, d datadir.Dir, q *publog.Question) {
			q.Kept = forked(t, d, 4)
		}},
		{"a proof out of a history that nobody was shown", translog.CodeInconsistent, func(t *testing.T, d datadir.Dir, _ *publog.Question) {
			l, _ := openLog(t, d)
			p, err := l.Add(t.Context(), tufrepo.Publication{Targets: some(4)[6:]}, ".lpb", nil)
			if err != nil {
				t.Fatal(err)
			}
			other := hidden(t, d)
			other.Add("hidden/evil.lpb", nil)
			for i, x := range p.Targets {
				if bundle := some(4)[6]; x.Path == translog.ProofPath(bundle.Path) {
					p.Targets[i].Content = other.Proof(other.Add(bundle.Path, bundle.Content)).Encode()
				}
			}
			keys, err := sign.RepositoryKeys(d, sign.All)
			if err == nil {
				_, err = tufrepo.Publish(t.Context(), d.Repository(), p, keys, time.Now())
			}
			if err != nil {
				t.Fatal(err)
			}
		}},
		{"a cosigned checkpoint of another history", translog.CodeInconsistent, func(t *testing.T, d datadir.Dir, _ *publog.Question) {
			replaceCosigned(t, d, forked(t, d, 4))
		}},
		{"a cosigned checkpoint of more than the log shows", translog.CodeRollback, func(t *testing.T, d datadir.Dir, _ *publog.Question) {
			replaceCosigned(t, d, forked(t, d, 9))
		}},
		{"a cosigned checkpoint that nobody signed", translog.CodeUntrusted, func(t *testing.T, d datadir.Dir, _ *publog.Question) {
			replaceCosigned(t, d, logsim.New(t, publog.Origin(d), 0).Whole().Checkpoint.Signed)
		}},
		{"a log that forgot", translog.CodeRollback, func(t *testing.T, d datadir.Dir, q *publog.Question) {
			q.Kept = forked(t, d, 9)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := withLog(t)
			mustPublish(t, d, some(3))
			var q publog.Question
			tt.do(t, d, &q)
			r := audit(t, d, func(to *publog.Question) { to.Kept = q.Kept })
			if len(r.Findings) == 0 || r.Findings[0].Code != tt.code {
				t.Errorf("findings %+v, want %s", r.Findings, tt.code)
			}
		})
	}
}

func replaceCosigned(t *testing.T, d datadir.Dir, signed []byte) {
	t.Helper()
	l, _ := openLog(t, d)
	if err := os.WriteFile(filepath.Join(l.Dir, translog.CosignedFile), signed, 0o644); err != nil {
		t.Fatal(err)
	}
}

// forked is a checkpoint of another history, signed by the log's own key.
func forked(t *testing.T, d datadir.Dir, size int) []byte {
	t.Helper()
	l := hidden(t, d)
	for i := range size {
		l.Add(fmt.Sprintf("x/%d", i), nil)
	}
	return l.Whole().Checkpoint.Signed
}

// hidden is another history under the log's own key.
func hidden(t *testing.T, d datadir.Dir) *logsim.Log {
	t.Helper()
	secret, err := os.ReadFile(publog.KeyFile(d))
	if err != nil {
		t.Fatal(err)
	}
	l := logsim.New(t, publog.Origin(d), 0)
	l.UseKey(strings.TrimSpace(string(secret)))
	return l
}

func spoil(t *testing.T, name string) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-2] ^= 1
	if err := os.WriteFile(name, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// serveWitness is a witness on a socket, with its verifier key and address as
// Init takes them.
func serveWitness(t *testing.T, name string, logKey string) (vkeyAndURL string, stop func()) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, witness.KeyFile), []byte(logsim.Secret(t, name)), 0o600); err != nil {
		t.Fatal(err)
	}
	w, err := witness.Open(dir, []string{logKey})
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(w.Handler(slog.New(slog.DiscardHandler)))
	stop = func() { s.Close(); _ = w.Close() }
	t.Cleanup(stop)
	return w.Key().String() + " " + s.URL, stop
}

// TestNothingIsPublishedWithoutTheQuorum: two of three witnesses, of which
// first one and then two are away.
func TestNothingIsPublishedWithoutTheQuorum(t *testing.T) {
	d := folder(t, trust.Small)
	secret := logsim.Secret(t, publog.Origin(d))
	if err := os.WriteFile(publog.KeyFile(d), []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := translog.ParseSecret(secret)
	if err != nil {
		t.Fatal(err)
	}
	var ws []string
	var stops []func()
	for i := range 3 {
		w, stop := serveWitness(t, fmt.Sprintf("w%d.example", i), s.Log().String())
		ws, stops = append(ws, w), append(stops, stop)
	}
	if _, err := publog.Init(d, publog.Witnesses{}); fault.CodeOf(err) != translog.CodePolicy {
		t.Errorf("profile small without witnesses: %v", err)
	}
	if _, err := publog.Init(d, publog.Witnesses{Keys: ws, Need: 2}); err != nil {
		t.Fatal(err)
	}
	mustPublish(t, d, some(1))
	stops[0]()
	mustPublish(t, d, some(2))
	stops[1]()
	if err := publishAll(t.Context(), d, some(3)); fault.CodeOf(err) != translog.CodeQuorum || fault.KindOf(err) != fault.Unavailable {
		t.Errorf("one of three: %v", err)
	}
	r := audit(t, d, nil)
	if r.Targets != 4 || r.Proofs != 2 || len(r.Findings) != 1 || r.Findings[0].Code != publog.CodeUnknown {
		t.Errorf("audit %+v", r)
	}
	if len(r.Logs[0].Cosigners) != 2 {
		t.Errorf("cosigners %v", r.Logs[0].Cosigners)
	}
}

// TestARestoredBackupIsNoticed: the publisher's folder goes back in time; its
// witnesses do not.
func TestARestoredBackupIsNoticed(t *testing.T) {
	d := folder(t, trust.Small)
	secret := logsim.Secret(t, publog.Origin(d))
	if err := os.WriteFile(publog.KeyFile(d), []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := translog.ParseSecret(secret)
	if err != nil {
		t.Fatal(err)
	}
	w, _ := serveWitness(t, "w.example", s.Log().String())
	if _, err := publog.Init(d, publog.Witnesses{Keys: []string{w}}); err != nil {
		t.Fatal(err)
	}
	mustPublish(t, d, some(2))
	backup := filepath.Join(t.TempDir(), "backup")
	if err := os.CopyFS(backup, os.DirFS(d.Repository())); err != nil {
		t.Fatal(err)
	}
	mustPublish(t, d, some(4))
	if err := os.RemoveAll(d.Repository()); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(backup, d.Repository()); err != nil {
		t.Fatal(err)
	}
	if err := publishAll(t.Context(), d, some(3)); fault.CodeOf(err) != translog.CodeRollback {
		t.Errorf("shorter than what the witness saw: %v", err)
	}
	if err := publishAll(t.Context(), d, append(some(3), some(9)[10:]...)); fault.CodeOf(err) != translog.CodeInconsistent {
		t.Errorf("longer, with another history: %v", err)
	}
}

// TestAProofIsMadeAnewWhenThePolicyAsksForMore: the file it speaks of stays.
func TestAProofIsMadeAnewWhenThePolicyAsksForMore(t *testing.T) {
	d := withLog(t)
	mustPublish(t, d, some(2))
	l, _ := openLog(t, d)
	w, _ := serveWitness(t, "w.example", l.Key().String())
	key, url, _ := strings.Cut(w, " ")
	policy := fmt.Sprintf("log %s\nwitness w %s %s\nquorum w\n", l.Key(), key, url)
	if err := os.WriteFile(publog.PolicyFile(d), []byte(policy), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := publog.Init(d, publog.Witnesses{}); err != nil {
		t.Fatal(err)
	}
	if r := audit(t, d, nil); r.Proofs != 0 || len(r.Findings) != 2 || r.Findings[0].Code != translog.CodeQuorum {
		t.Errorf("before: %+v", r)
	}
	mustPublish(t, d, some(2))
	if r := audit(t, d, nil); r.Proofs != 2 || len(r.Findings) != 0 {
		t.Errorf("after: %+v", r)
	}
}
