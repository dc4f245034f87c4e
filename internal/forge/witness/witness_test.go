// SPDX-License-Identifier: Apache-2.0

package witness

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/testkit/logsim"
	"klatch/internal/translog"
)

var now = time.Unix(1_790_000_000, 0)

// watched is a witness of one log with n entries.
func watched(t *testing.T, n int) (*Witness, *logsim.Log) {
	t.Helper()
	l := logsim.New(t, "example.org/log", 0)
	for i := range n {
		l.Add(fmt.Sprintf("a/%d", i), nil)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, KeyFile), []byte(logsim.Secret(t, "w.example")), 0o600); err != nil {
		t.Fatal(err)
	}
	return open(t, dir, l), l
}

func open(t *testing.T, dir string, l *logsim.Log) *Witness {
	t.Helper()
	w, err := Open(dir, []string{l.Key.String()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	return w
}

// submission asks for the log's newest checkpoint, as an honest log would.
func submission(t *testing.T, l *logsim.Log, old int64) translog.Submission {
	t.Helper()
	whole := l.Whole()
	proof, err := whole.ProveExtends(old)
	if err != nil {
		t.Fatal(err)
	}
	return translog.Submission{Old: old, Proof: proof, Checkpoint: whole.Checkpoint.Signed}
}

// first n entries of a log.
func first(l *logsim.Log, n int) *logsim.Log {
	f := l.Fork()
	f.Entries = f.Entries[:n]
	return f
}

func TestAWitnessCosignsWhatOnlyGrew(t *testing.T) {
	w, l := watched(t, 300)
	p, err := translog.ParsePolicy(fmt.Sprintf("log %s\nwitness w %s\nquorum w\n", l.Key, w.Key()))
	if err != nil {
		t.Fatal(err)
	}
	old := int64(0)
	for _, n := range []int{1, 2, 100, 100, 256, 300} {
		part := first(l, n)
		a, err := w.Add(submission(t, part, old).Encode(), now)
		if err != nil || a.Status != http.StatusOK {
			t.Fatalf("%d entries: %+v, %v", n, a, err)
		}
		if _, err := p.Open(append(part.Whole().Checkpoint.Signed, a.Body...)); err != nil {
			t.Errorf("%d entries: %v", n, err)
		}
		old = int64(n)
	}
	// Another process goes on where this one was.
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	again := open(t, w.dir, l)
	if a, err := again.Add(submission(t, l, 0).Encode(), now); a.Status != http.StatusConflict || a.Body != "300\n" || a.Type != "text/x.tlog.size" {
		t.Errorf("after a restart: %+v, %v", a, err)
	}
}

// TestAWitnessRefuses: with the status that C2SP tlog-witness names, and
// without a signature.
func TestAWitnessRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		status int
		ask    func(l *logsim.Log) translog.Submission
	}{
		{"another history that is longer", 422, func(l *logsim.Log) translog.Submission {
			l.Entries[3].Bytes++
			return submission(t, l, 10)
		}},
		{"another history of the same size", 409, func(l *logsim.Log) translog.Submission {
			f := first(l, 10)
			f.Entries[3].Bytes++
			return submission(t, f, 10)
		}},
		{"an older state, with the size it has seen", 400, func(l *logsim.Log) translog.Submission {
			return translog.Submission{Old: 10, Checkpoint: first(l, 5).Whole().Checkpoint.Signed}
		}},
		{"an older state, with an older size", 409, func(l *logsim.Log) translog.Submission { return submission(t, first(l, 5), 2) }},
		{"from nothing, as if it had seen nothing", 409, func(l *logsim.Log) translog.Submission { return submission(t, l, 0) }},
		{"no proof", 422, func(l *logsim.Log) translog.Submission {
			s := submission(t, l, 10)
			s.Proof = nil
			return s
		}},
		{"a proof where none is needed", 422, func(l *logsim.Log) translog.Submission {
			s := submission(t, first(l, 10), 10)
			s.Proof = submission(t, l, 10).Proof
			return s
		}},
		{"a proof of another pair", 422, func(l *logsim.Log) translog.Submission {
			s := submission(t, l, 10)
			s.Proof = submission(t, l, 11).Proof
			return s
		}},
		{"a log that it does not serve", 404, func(l *logsim.Log) translog.Submission {
			l.Origin = "example.org/another"
			return submission(t, l, 10)
		}},
		{"another key of that name", 403, func(l *logsim.Log) translog.Submission {
			l.UseKey(logsim.Secret(t, l.Origin))
			return submission(t, l, 10)
		}},
		{"extension lines", 400, func(l *logsim.Log) translog.Submission {
			s := submission(t, l, 10)
			s.Checkpoint = l.Sign(l.Whole().Checkpoint.Body() + "more\n")
			return s
		}},
		{"something else", 404, func(*logsim.Log) translog.Submission {
			return translog.Submission{Old: 10, Checkpoint: []byte("hello")}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, l := watched(t, 20)
			if _, err := w.Add(submission(t, first(l, 10), 0).Encode(), now); err != nil {
				t.Fatal(err)
			}
			s := tt.ask(l.Fork())
			a, err := w.Add(s.Encode(), now)
			if err == nil || a.Status != tt.status || strings.Contains(a.Body, "—") {
				t.Errorf("%+v, %v; want status %d", a, err, tt.status)
			}
			// It goes on with the honest log as if nothing had been.
			honest := first(l, 10)
			if a, err := w.Add(submission(t, honest, 10).Encode(), now); a.Status != http.StatusOK {
				t.Errorf("afterwards: %+v, %v", a, err)
			}
			evidence, _ := filepath.Glob(filepath.Join(w.dir, "two-histories-*"))
			if (len(evidence) == 1) != (tt.name == "another history of the same size") {
				t.Errorf("evidence %v", evidence)
			}
		})
	}
}

// TestNothingIsSignedThatIsNotRemembered: the disk fails before the signature.
func TestNothingIsSignedThatIsNotRemembered(t *testing.T) {
	w, l := watched(t, 5)
	w.write = func(string, []byte, fs.FileMode) error { return errors.New("disk full") }
	if a, err := w.Add(submission(t, l, 0).Encode(), now); err == nil || a.Status != http.StatusInternalServerError || a.Body != "" {
		t.Errorf("%+v, %v", a, err)
	}
	seen, err := w.seen(l.Origin)
	if err != nil || seen.Size != 0 {
		t.Errorf("remembers %+v, %v", seen, err)
	}
	// A damaged memory is not an empty one.
	if err := os.WriteFile(w.memoryFile(l.Origin), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if a, err := w.Add(submission(t, l, 0).Encode(), now); fault.CodeOf(err) != "state_malformed" || a.Status != http.StatusInternalServerError {
		t.Errorf("%+v, %v", a, err)
	}
}

// TestTwoHistoriesRaceAndOneWins: of many that ask at once, all that are
// cosigned are of one history.
func TestTwoHistoriesRaceAndOneWins(t *testing.T) {
	w, l := watched(t, 8)
	s := httptest.NewServer(w.Handler(slog.New(slog.DiscardHandler)))
	defer s.Close()
	var signed [2]atomic.Int64
	var all sync.WaitGroup
	for i := range 20 {
		side := l.Fork()
		if i%2 == 1 {
			side.Entries[0].Bytes++
		}
		body := submission(t, side, 0).Encode()
		all.Go(func() {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL+"/add-checkpoint", strings.NewReader(string(body)))
			if err != nil {
				t.Error(err)
				return
			}
			answer, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Error(err)
				return
			}
			defer answer.Body.Close()
			if answer.StatusCode == http.StatusOK {
				signed[i%2].Add(1)
			}
		})
	}
	all.Wait()
	if signed[0].Load()+signed[1].Load() != 1 {
		t.Errorf("%d and %d cosignatures from size 0", signed[0].Load(), signed[1].Load())
	}
}

func TestOneProcessAtATime(t *testing.T) {
	w, l := watched(t, 1)
	if _, err := Open(w.dir, []string{l.Key.String()}); fault.CodeOf(err) != "locked" {
		t.Errorf("a second one: %v", err)
	}
	if _, err := Open(t.TempDir(), []string{l.Key.String()}); fault.CodeOf(err) != "no_key" {
		t.Errorf("without a key: %v", err)
	}
}

// TestCollectTakesOverNothingElse: a witness that answers with more, or with
// something else, adds nothing to the checkpoint.
func TestCollectTakesOverNothingElse(t *testing.T) {
	w, l := watched(t, 5)
	honest := httptest.NewServer(w.Handler(slog.New(slog.DiscardHandler)))
	defer honest.Close()
	for _, tt := range []struct {
		name string
		lie  func(good string) (int, string)
		code fault.Code // empty: it is taken
		text string
	}{
		{"the truth", func(good string) (int, string) { return 200, good }, "", ""},
		{"the truth and a stranger's line", func(good string) (int, string) { return 200, good + "— x.example AAAAAAAA\n" }, "", ""},
		{"text before it", func(good string) (int, string) { return 200, "hello\n\n" + good }, "log_quorum", "its cosignature"},
		{"nothing", func(string) (int, string) { return 200, "" }, "log_quorum", "its cosignature"},
		{"a page", func(string) (int, string) { return 200, strings.Repeat("<html>", 10000) }, "log_quorum", "its cosignature"},
		{"an impossible size", func(string) (int, string) { return 409, "-1\n" }, "log_quorum", "status 409"},
		{"the same size for ever", func(string) (int, string) { return 409, "0\n" }, "log_inconsistent", "another history"},
		{"more than there is", func(string) (int, string) { return 409, "1000000\n" }, "log_rollback", "1000000"},
		{"a size in words", func(string) (int, string) { return 409, "many\n" }, "log_quorum", "status 409"},
		{"it knows nothing of this log", func(string) (int, string) { return 404, "" }, "log_quorum", "does not serve this log"},
		{"busy", func(string) (int, string) { return 503, "" }, "log_quorum", "status 503"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
				status, body := tt.lie(w.secret.Cosign(l.Whole().Checkpoint.Body(), now))
				rw.WriteHeader(status)
				_, _ = rw.Write([]byte(body))
			}))
			defer s.Close()
			p, err := translog.ParsePolicy(fmt.Sprintf("log %s\nwitness w %s %s\nquorum w\n", l.Key, w.Key(), s.URL))
			if err != nil {
				t.Fatal(err)
			}
			signed, err := Collect(t.Context(), http.DefaultClient, p, l.Whole())
			if fault.CodeOf(err) != tt.code || err == nil && strings.Contains(string(signed), "x.example") {
				t.Errorf("%q, %v; want code %q", signed, err, tt.code)
			}
			if err != nil && !strings.Contains(err.Error(), tt.text) {
				t.Errorf("%v, want %q in it", err, tt.text)
			}
		})
	}
}

// TestAWitnessThatIsAwayIsNamed: by address, by connection, by the answer.
func TestAWitnessThatIsAwayIsNamed(t *testing.T) {
	w, l := watched(t, 2)
	cut := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Length", "100")
		_, _ = rw.Write([]byte("half"))
	}))
	defer cut.Close()
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	for _, url := range []string{cut.URL, gone.URL, ""} {
		p, err := translog.ParsePolicy(fmt.Sprintf("log %s\nwitness far-away %s %s\nquorum far-away\n", l.Key, w.Key(), url))
		if err != nil {
			t.Fatal(err)
		}
		_, err = Collect(t.Context(), http.DefaultClient, p, l.Whole())
		if fault.KindOf(err) != fault.Unavailable || !strings.Contains(err.Error(), "far-away") || strings.Contains(err.Error(), "cosignature:") {
			t.Errorf("address %q: %v", url, err)
		}
	}
}

// TestAnEmptyLogHasOneRoot: anything else is no checkpoint of nothing.
func TestAnEmptyLogHasOneRoot(t *testing.T) {
	w, l := watched(t, 0)
	wrong := translog.Submission{Checkpoint: l.Sign(l.Origin + "\n0\nAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n")}
	if a, err := w.Add(wrong.Encode(), now); err == nil || a.Status != http.StatusUnprocessableEntity {
		t.Errorf("%+v, %v", a, err)
	}
	if a, err := w.Add(submission(t, l, 0).Encode(), now); err != nil || a.Status != http.StatusOK {
		t.Errorf("%+v, %v", a, err)
	}
}
