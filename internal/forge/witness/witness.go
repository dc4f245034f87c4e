// SPDX-License-Identifier: Apache-2.0

// Package witness keeps other people's logs honest: a witness remembers the
// largest checkpoint of each log that it has seen, and cosigns a new one only
// when the log proves that it continues the old one (C2SP tlog-witness). What
// it remembers is on disk before it signs. It also holds the publisher's side:
// asking witnesses. It must not know what a log is about.
//
// Start with Witness.Add, which is the whole decision.
package witness

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/translog"
)

// Witness is one witness with its memory. Safe for concurrent use.
type Witness struct {
	dir    string
	secret translog.Secret
	policy *translog.Policy // the logs that it knows
	unlock func() error

	mu    sync.Mutex // from the first look at the memory to the signature
	write func(string, []byte, fs.FileMode) error
}

// KeyFile is where a witness's secret lies below its folder.
const KeyFile = "witness.key"

// Open takes a witness's folder for this process. logs are the verifier keys
// of the logs it serves.
func Open(dir string, logs []string) (*Witness, error) {
	b, err := durable.ReadFile(filepath.Join(dir, KeyFile), 4<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "no_key", "%s is not a witness's folder: %w", dir, err).
			WithHint("make one: klatch-forge log witness init %s --name NAME", dir)
	}
	if err != nil {
		return nil, err
	}
	w := &Witness{dir: dir, write: durable.WriteFile}
	if w.secret, err = translog.ParseSecret(string(b)); err != nil {
		return nil, err
	}
	var text strings.Builder
	for _, l := range logs {
		text.WriteString("log " + l + "\n")
	}
	if w.policy, err = translog.ParsePolicy(text.String() + "quorum none\n"); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(w.stateDir(), 0o700); err != nil {
		return nil, err
	}
	if w.unlock, err = durable.Lock(filepath.Join(dir, ".lock")); err != nil {
		return nil, err
	}
	return w, durable.RemoveTemp(w.stateDir())
}

// Close gives the folder free.
func (w *Witness) Close() error { return w.unlock() }

// Key is the verifier key that publishers put into their policies.
func (w *Witness) Key() *translog.Verifier { return w.secret.Witness() }

func (w *Witness) stateDir() string { return filepath.Join(w.dir, "logs") }

// memory is what a witness remembers of one log.
type memory struct {
	Format     string `json:"format"`
	Origin     string `json:"origin"`
	Checkpoint string `json:"checkpoint"` // signed note
}

const memoryFormat = "klatch-witness/1"

func (w *Witness) memoryFile(origin string) string {
	sum := sha256.Sum256([]byte(origin))
	return filepath.Join(w.stateDir(), hex.EncodeToString(sum[:16])+".json")
}

// seen is the largest checkpoint of a log; the zero value if there is none.
func (w *Witness) seen(origin string) (translog.Checkpoint, error) {
	file := w.memoryFile(origin)
	b, err := durable.ReadFile(file, 2*translog.MaxCheckpoint)
	if errors.Is(err, fs.ErrNotExist) {
		return translog.Checkpoint{}, nil
	}
	if err != nil {
		return translog.Checkpoint{}, err
	}
	var m memory
	err = json.Unmarshal(b, &m)
	if err == nil && (m.Format != memoryFormat || m.Origin != origin) {
		err = fmt.Errorf("format %.40q, origin %.80q", m.Format, m.Origin)
	}
	var c translog.Checkpoint
	if err == nil {
		c, err = w.policy.OpenUnwitnessed([]byte(m.Checkpoint))
	}
	if err != nil {
		return c, fault.New(fault.Internal, "state_malformed", "read %s: not what was written there: %w", file, err).
			WithHint("without its memory a witness must not sign: restore the file, or start a new witness with a new key")
	}
	return c, nil
}

// Answer is what a witness says, in the words of HTTP.
type Answer struct {
	Status int
	Type   string // of the content; empty is plain text
	Body   string
}

// Add decides about one submission.
func (w *Witness) Add(request []byte, now time.Time) (Answer, error) {
	s, err := translog.ParseSubmission(request)
	if err != nil {
		return Answer{Status: http.StatusBadRequest}, err
	}
	origin, _, _ := strings.Cut(string(s.Checkpoint), "\n")
	if w.policy.Log(origin) == nil {
		return Answer{Status: http.StatusNotFound}, fault.New(fault.NotFound, "log_unknown", "log %.80q is not one that this witness serves", origin)
	}
	next, err := w.policy.OpenUnwitnessed(s.Checkpoint)
	if fault.CodeOf(err) == translog.CodeMalformed {
		return Answer{Status: http.StatusBadRequest}, err
	}
	if err != nil {
		return Answer{Status: http.StatusForbidden}, err
	}
	if s.Old > next.Size {
		return Answer{Status: http.StatusBadRequest}, fault.New(fault.Invalid, translog.CodeRollback, "old size %d is larger than %d", s.Old, next.Size)
	}

	w.mu.Lock()
	defer w.mu.Unlock()
	seen, err := w.seen(origin)
	if err != nil {
		return Answer{Status: http.StatusInternalServerError}, err
	}
	conflict := Answer{http.StatusConflict, "text/x.tlog.size", fmt.Sprintf("%d\n", seen.Size)}
	switch {
	case s.Old != seen.Size:
		return conflict, fault.New(fault.Conflict, "log_size", "%d entries of %s were seen, not %d", seen.Size, origin, s.Old)
	case s.Old == next.Size && s.Old > 0 && next.Root != seen.Root:
		// Signed by the log twice: nobody else can have made this.
		err := fault.New(fault.Untrusted, translog.CodeInconsistent, "log %s has two histories of %d entries", origin, seen.Size)
		return conflict, errors.Join(err, w.keepEvidence(seen, next))
	}
	if err := continues(s, seen, next); err != nil {
		return Answer{Status: http.StatusUnprocessableEntity}, err
	}
	b, err := json.Marshal(memory{memoryFormat, origin, string(next.Signed)})
	if err == nil {
		err = w.write(w.memoryFile(origin), append(b, '\n'), 0o600)
	}
	if err != nil {
		return Answer{Status: http.StatusInternalServerError}, err
	}
	return Answer{Status: http.StatusOK, Body: w.secret.Cosign(next.Body(), now)}, nil
}

// continues checks the proof that the log only grew.
func continues(s translog.Submission, seen, next translog.Checkpoint) error {
	empty := s.Old == 0 || s.Old == next.Size
	switch {
	case empty && len(s.Proof) > 0:
		return fault.New(fault.Untrusted, translog.CodeMalformed, "%d hashes where none is needed", len(s.Proof))
	case next.Size == 0:
		root, err := tlog.TreeHash(0, nil)
		if err != nil || root != next.Root {
			return fault.New(fault.Untrusted, translog.CodeInconsistent, "an empty log with root %s", next.Root)
		}
		return nil
	case empty:
		return nil
	}
	if err := tlog.CheckTree(s.Proof, next.Size, next.Root, seen.Size, seen.Root); err != nil {
		return fault.New(fault.Untrusted, translog.CodeInconsistent, "nothing proves that checkpoint %d of %s continues checkpoint %d", next.Size, next.Origin, seen.Size)
	}
	return nil
}

func (w *Witness) keepEvidence(a, b translog.Checkpoint) error {
	sum := sha256.Sum256(append(append([]byte{}, a.Signed...), b.Signed...))
	file := filepath.Join(w.dir, "two-histories-"+hex.EncodeToString(sum[:8])+".txt")
	return w.write(file, []byte(string(a.Signed)+"\n"+string(b.Signed)), 0o600)
}
