// SPDX-License-Identifier: Apache-2.0

package translog_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"testing"
	"time"

	"klatch/internal/testkit/logsim"
	"klatch/internal/translog"
)

// fixed is a log whose keys are known, so that the corpus stays of use.
func fixed(t testing.TB) *logsim.Log {
	l := logsim.New(t, "example.org/log", 0)
	l.UseKey(secretOf("example.org/log", 0))
	w, err := translog.ParseSecret(secretOf("witness.example/w1", 1))
	if err != nil {
		t.Fatal(err)
	}
	l.Witnesses = append(l.Witnesses, w)
	l.Add("a/b/c/klatch_1.lpb", []byte("1"))
	l.Add("a/b/c/klatch_2.lpb", []byte("2"))
	l.Add("a/b/c/klatch_3.lpb", []byte("3"))
	return l
}

func secretOf(name string, seed byte) string {
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{seed}, ed25519.SeedSize))
	id := sha256.Sum256(append([]byte(name+"\n\x01"), key[ed25519.SeedSize:]...))
	return fmt.Sprintf("PRIVATE+KEY+%s+%x+%s", name, id[:4], base64.StdEncoding.EncodeToString(append([]byte{1}, key.Seed()...)))
}

// FuzzProof: what is read has one form, and no other entry than the logged one
// is ever accepted.
func FuzzProof(f *testing.F) {
	l := fixed(f)
	p, err := translog.ParsePolicy(l.Policy(1))
	if err != nil {
		f.Fatal(err)
	}
	for i := range l.Entries {
		f.Add(l.Proof(int64(i), 0).Encode())
	}
	f.Add([]byte("c2sp.org/tlog-proof@v1\nindex 0\n\n"))
	never := translog.EntryOf("a/b/c/klatch_9.lpb", []byte("never logged"))
	f.Fuzz(func(t *testing.T, b []byte) {
		proof, err := translog.ParseProof(b)
		if err == nil && !bytes.Equal(proof.Encode(), b) {
			t.Errorf("%q is read as %q", b, proof.Encode())
		}
		if _, err := p.Verify(b, never); err == nil {
			t.Errorf("%q proves what was never logged", b)
		}
	})
}

// FuzzCheckpoint: a checkpoint that is accepted is one that the log signed.
func FuzzCheckpoint(f *testing.F) {
	l := fixed(f)
	p, err := translog.ParsePolicy(l.Policy(1))
	if err != nil {
		f.Fatal(err)
	}
	whole := l.Whole()
	f.Add(l.Cosign(whole.Checkpoint.Signed, 0))
	f.Add(whole.Checkpoint.Signed)
	f.Add(l.Sign(whole.Checkpoint.Body() + "extension\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := p.OpenUnwitnessed(b)
		if err == nil && (c.Body() != whole.Checkpoint.Body() || !bytes.HasPrefix(b, []byte(c.Body()))) {
			t.Errorf("%q is read as %q", b, c.Body())
		}
		if _, err := p.Open(b); err == nil && len(p.Cosigners(b)) != 1 {
			t.Errorf("%q has a quorum without its witness", b)
		}
	})
}

// FuzzCosignature: a witness's answer is foreign to the publisher.
func FuzzCosignature(f *testing.F) {
	l := fixed(f)
	p, err := translog.ParsePolicy(l.Policy(1))
	if err != nil {
		f.Fatal(err)
	}
	whole := l.Whole()
	f.Add([]byte(l.Witnesses[0].Cosign(whole.Checkpoint.Body(), time.Unix(1, 0))))
	f.Add([]byte("— witness.example/w1 AAAA\n"))
	f.Fuzz(func(t *testing.T, line []byte) {
		c, err := p.Open(append(bytes.Clone(whole.Checkpoint.Signed), line...))
		if err == nil && c.Body() != whole.Checkpoint.Body() {
			t.Errorf("%q changes the checkpoint to %q", line, c.Body())
		}
	})
}

// FuzzSubmission: whoever reaches a witness can send it anything.
func FuzzSubmission(f *testing.F) {
	l := fixed(f)
	whole := l.Whole()
	proof, err := whole.ProveExtends(2)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(translog.Submission{Old: 2, Proof: proof, Checkpoint: whole.Checkpoint.Signed}.Encode())
	f.Add([]byte("old 0\n\nx"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := translog.ParseSubmission(b); err == nil && !bytes.Equal(s.Encode(), b) {
			t.Errorf("%q is read as %q", b, s.Encode())
		}
	})
}

// FuzzLogPolicy: a policy that is read never counts a witness twice.
func FuzzLogPolicy(f *testing.F) {
	l := fixed(f)
	f.Add(l.Policy(0))
	f.Add(l.Policy(1))
	f.Add(l.Policy(0) + "group g any w1\ngroup h all g\n")
	f.Fuzz(func(t *testing.T, text string) {
		if p, err := translog.ParsePolicy(text); err == nil && (p.Least() > len(p.Witnesses) || len(p.Logs) == 0) {
			t.Errorf("%q needs %d of %d witnesses", text, p.Least(), len(p.Witnesses))
		}
	})
}

// FuzzEntry: one form.
func FuzzEntry(f *testing.F) {
	f.Add(fixed(f).Entries[0].Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, err := translog.ParseEntry(b); err == nil && !bytes.Equal(e.Encode(), b) {
			t.Errorf("%q is read as %q", b, e.Encode())
		}
	})
}
