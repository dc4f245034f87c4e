// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"klatch/internal/forge/audit"
	"klatch/internal/forge/publog"
	"klatch/internal/forge/sign"
	"klatch/internal/forge/witness"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/cut"
	"klatch/internal/testkit/evidencesim"
	"klatch/internal/testkit/logsim"
	"klatch/internal/translog"
	"klatch/internal/trust"
	"klatch/internal/tufclient"
)

// naming are the calls after which a file has another name, or none; between
// two of them a kill leaves the same as before the second.
var naming = []string{"renameat", "renameat2", "linkat", "unlinkat", "mkdirat"}

// TestPowerCutAtPublish: the real klatch-forge publishes a livepatch with its
// evidence, its log entries and proofs, cosigned by two witnesses, or recalls
// one. It is killed before each system call that changes a name, and each call
// that changes a file fails once with an input/output error. Whatever is left, a machine that
// knew the state before and one that begins anew accept it, the log is whole
// and covers what is offered, and the same command completes the work: with no
// entry twice, and the same result as if nothing had happened.
func TestPowerCutAtPublish(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		done func(s seen) bool
	}{
		{"publish", []string{"publish"}, func(s seen) bool { return slices.Equal(s.bundles, []string{"klatch_1.lpb", "klatch_2.lpb"}) }},
		{"recall", []string{"recall", "--kernel", string(evidencesim.Release), "--sequence", "1", "--reason", "it eats files"}, func(s seen) bool {
			return s.recalls == 1 && len(s.bundles) == 0
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newPublishing(t, tt.name == "publish")
			all := p.points(tt.args)
			for _, pt := range all {
				p.cut(pt, tt.args, tt.done)
			}
			// How often the log's threads write their checkpoint is up to the time.
			if t.Logf("%d points were not reached", p.missed); p.missed > len(all)/5 {
				t.Errorf("%d of %d points were not reached", p.missed, len(all))
			}
		})
	}
}

// publishing is a publisher of profile full before a command, with what its
// witnesses and a machine remember of it.
type publishing struct {
	*testing.T
	before  string // data folder
	witness [2]string
	machine string
	serving [2]atomic.Pointer[http.Handler]
	missed  int    // points that a run did not come to
	stop    func() // ends the witnesses of the command before
}

func newPublishing(t *testing.T, second bool) *publishing {
	t.Helper()
	pub := evidencesim.New(t)
	d := pub.Dir
	p := &publishing{T: t, before: d.Path, machine: t.TempDir()}
	secret := logsim.Secret(t, publog.Origin(d))
	p.check(os.WriteFile(publog.KeyFile(d), []byte(secret), 0o600))
	own, err := translog.ParseSecret(secret)
	p.check(err)
	var keys []string
	for i := range p.witness {
		p.witness[i] = t.TempDir()
		name := fmt.Sprintf("w%d.example", i)
		p.check(os.WriteFile(filepath.Join(p.witness[i], witness.KeyFile), []byte(logsim.Secret(t, name)), 0o600))
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { (*p.serving[i].Load()).ServeHTTP(w, r) }))
		t.Cleanup(server.Close)
		w, err := witness.Open(p.witness[i], []string{own.Log().String()})
		p.check(err)
		keys = append(keys, w.Key().String()+" "+server.URL)
		p.check(w.Close())
	}
	_, err = publog.Init(d, publog.Witnesses{Keys: keys, Need: 2})
	p.check(err)
	// Sequence 1 alone is published and known to a machine.
	bundle := sign.BundleFile(d, pub.Build)
	p.check(os.Rename(bundle, bundle+".later"))
	p.stop = p.witnesses(p.witness)
	if out, said, exit := program(t, "--dir", d.Path, "publish"); exit != 0 {
		t.Fatalf("publish: %d %s%s", exit, out, said)
	}
	p.stop()
	p.stop = nil
	s := p.look(d.Path, p.machine)
	if len(s.bundles) != 1 {
		t.Fatalf("before: %+v", s)
	}
	if second {
		p.check(os.Rename(bundle+".later", bundle))
	}
	return p
}

func (p *publishing) check(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

// witnesses serves the two of these folders.
func (p *publishing) witnesses(dirs [2]string) (stop func()) {
	p.Helper()
	if p.stop != nil {
		p.stop()
	}
	var stops []func() error
	for i, dir := range dirs {
		w, err := witness.Open(dir, p.logKeys())
		p.check(err)
		h := w.Handler(slog.New(slog.DiscardHandler))
		p.serving[i].Store(&h)
		stops = append(stops, w.Close)
	}
	return func() {
		for _, s := range stops {
			p.check(s())
		}
	}
}

func (p *publishing) logKeys() (out []string) {
	p.Helper()
	policy, err := translog.ParsePolicy(p.anchor(p.before).LogPolicy)
	p.check(err)
	for _, l := range policy.Logs {
		out = append(out, l.String())
	}
	return out
}

func (p *publishing) anchor(dir string) *trust.Anchor {
	p.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	p.check(err)
	for _, f := range files {
		b, err := os.ReadFile(f)
		p.check(err)
		if a, err := trust.ParseAnchor(b, true); err == nil {
			return a
		}
	}
	p.Fatal("no trust anchor in " + dir)
	return nil
}

func (p *publishing) copyOf(dir string) string {
	p.Helper()
	to, err := os.MkdirTemp(p.TempDir(), "copy")
	p.check(err)
	p.check(os.CopyFS(to, os.DirFS(dir)))
	return to
}

// point is one call of a command, by what it is and does, since the log's own
// threads do not always take turns in the same way.
type point struct {
	how  cut.How
	call string
	n    int // of several calls that look alike
}

func (pt point) String() string { return fmt.Sprintf("%s at %s, number %d", pt.how, pt.call, pt.n) }

// alike takes out of a call what differs from run to run.
var random = regexp.MustCompile(`[0-9a-f]{64}|(\.tmp-|checkpoint)[0-9]+`)

func alike(c cut.Call) string { return random.ReplaceAllString(c.String(), "$1*") }

// points runs the command undisturbed and lists its calls.
func (p *publishing) points(args []string) (out []point) {
	p.Helper()
	o := p.run(p.copyOf(p.before), cut.Kill, args, func(cut.Call) bool { return false })
	if o.Exit != 0 {
		p.Fatalf("without a cut: %d %s", o.Exit, o.Output)
	}
	seen := map[string]int{}
	for _, c := range o.Calls {
		key := alike(c)
		seen[key]++
		out = append(out, point{cut.Fail, key, seen[key]})
		if slices.Contains(naming, c.Name) {
			out = append(out, point{cut.Kill, key, seen[key]})
		}
	}
	p.Logf("%d calls change files, cut at %d points", len(o.Calls), len(out))
	if len(o.Calls) < 30 || len(out) < len(o.Calls)+8 {
		p.Errorf("fewer than a publication can do with: %v", o.Calls)
	}
	return out
}

// run gives the command witnesses of its own, that remember what they did
// before it.
func (p *publishing) run(data string, how cut.How, args []string, at func(cut.Call) bool) cut.Outcome {
	p.Helper()
	self, err := os.Executable()
	p.check(err)
	cmd := exec.CommandContext(p.Context(), self, append([]string{"--dir", data}, args...)...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	remembers := [2]string{p.copyOf(p.witness[0]), p.copyOf(p.witness[1])}
	p.stop = p.witnesses(remembers)
	o, err := cut.Run(cmd, data, how, at)
	p.check(err)
	return o
}

// cut runs the command with one call cut, looks at what is left, and completes
// it.
func (p *publishing) cut(pt point, args []string, done func(seen) bool) {
	p.Helper()
	data, memory := p.copyOf(p.before), p.copyOf(p.machine)
	n := 0
	out := p.run(data, pt.how, args, func(c cut.Call) bool {
		if alike(c) == pt.call {
			n++
		}
		return n == pt.n
	})
	if !out.Cut {
		if out.Exit != 0 {
			p.Errorf("%s: was not reached: %d %s", pt, out.Exit, out.Output)
		}
		p.missed++ // the log's threads did with fewer calls this time
		return
	}
	left := p.look(data, memory)
	p.look(data, p.TempDir()) // and one who begins anew
	if !done(left) && (left.recalls != 0 || !slices.Equal(left.bundles, []string{"klatch_1.lpb"})) {
		p.Errorf("%s: what is left is neither before nor after: %+v", pt, left)
	}
	if out.Exit == 0 && !done(left) {
		p.Errorf("%s: it says that it is done, and is not: %+v\n%s", pt, left, out.Output)
	}
	again := args
	if args[0] == "recall" {
		again = []string{"recall", "--resume"}
		if _, err := os.Stat(filepath.Join(data, "recalls.json")); os.IsNotExist(err) {
			again = args // it had not begun
		}
	}
	if out, said, exit := program(p.T, append([]string{"--dir", data}, again...)...); exit != 0 {
		p.Errorf("%s: the next run: %d %s%s", pt, exit, out, said)
		return
	}
	end := p.look(data, memory)
	if !done(end) || len(end.unknown) > 0 && args[0] == "publish" {
		p.Errorf("%s: completed: %+v", pt, end)
	}
	if temp, err := filepath.Glob(filepath.Join(data, "repository", "metadata", ".tmp-*")); err != nil || len(temp) > 0 {
		p.Errorf("%s: left behind: %v, %v", pt, temp, err)
	}
	for _, dir := range []string{data, memory} {
		p.check(os.RemoveAll(dir))
	}
}

// seen is a repository in the eyes of a machine and of an auditor.
type seen struct {
	bundles []string
	recalls int64
	entries int64
	unknown []string // logged and not offered
}

// look is what everybody does who believes nobody: a machine with a memory, an
// auditor of the log, a stranger who checks the evidence.
func (p *publishing) look(data, memory string) seen {
	p.Helper()
	var s seen
	anchor, repo, now := p.anchor(data), filepath.Join(data, "repository"), time.Now()
	base, client, err := tufclient.Source(repo, nil)
	p.check(err)
	snap, err := tufclient.Refresh(p.Context(), tufclient.Config{Root: anchor.Root, Dir: memory, BaseURL: base, Client: client, Now: now})
	if err != nil {
		p.Errorf("a machine refuses: %v", err)
		return s
	}
	for _, t := range snap.Targets() {
		b, err := snap.Download(p.Context(), t, livepatch.MaxBundle)
		if err != nil {
			p.Errorf("what is offered cannot be had: %v", err)
		}
		if v := livepatch.RecallsVersion(t.Path); v > 0 {
			s.recalls = v
			if _, err := anchor.OpenRecalls(b); err != nil {
				p.Errorf("recalls: %v", err)
			}
		}
		if strings.HasSuffix(t.Path, livepatch.BundleSuffix) {
			s.bundles = append(s.bundles, filepath.Base(t.Path))
		}
	}
	slices.Sort(s.bundles)
	r, err := publog.Audit(p.Context(), publog.Question{Anchor: anchor, From: repo, Now: now})
	p.check(err)
	s.entries = r.Logs[0].Size
	entries := map[string]bool{}
	for _, f := range r.Findings {
		// A file is logged before it is offered, and withdrawn ones stay there.
		if f.Code != publog.CodeUnknown {
			p.Errorf("an auditor finds %+v", f)
		}
		if entries[f.Target] {
			p.Errorf("%s is in the log twice", f.Target)
		}
		entries[f.Target] = true
		s.unknown = append(s.unknown, f.Target)
	}
	if r.Proofs != len(s.bundles) {
		p.Errorf("%d proofs for %q", r.Proofs, s.bundles)
	}
	if len(s.bundles) == 0 {
		return s
	}
	a, err := audit.Repository(p.Context(), audit.Question{Anchor: anchor, From: repo, Now: now})
	p.check(err)
	if bad := a.Refused(); len(bad) > 0 {
		p.Errorf("a stranger refuses %+v", bad)
	}
	return s
}
