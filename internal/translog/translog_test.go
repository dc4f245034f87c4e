// SPDX-License-Identifier: Apache-2.0

package translog_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	formats "github.com/transparency-dev/formats/note"
	"golang.org/x/mod/sumdb/note"

	"klatch/internal/fault"
	"klatch/internal/testkit/logsim"
	"klatch/internal/translog"
)

// filled is a log with n entries and three witnesses.
func filled(t testing.TB, n int) *logsim.Log {
	t.Helper()
	l := logsim.New(t, "example.org/log", 3)
	for i := range n {
		l.Add(fmt.Sprintf("debian-12/amd64/6.1.0-50/klatch_%d.lpb", i+1), fmt.Appendf(nil, "bundle %d", i))
	}
	return l
}

func policy(t testing.TB, text string) *translog.Policy {
	t.Helper()
	p, err := translog.ParsePolicy(text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestAProofSaysWhatWasLogged(t *testing.T) {
	for _, n := range []int{1, 2, 3, 255, 256, 257, 600} {
		l := filled(t, n)
		p := policy(t, l.Policy(2))
		for _, i := range []int{0, n / 2, n - 1} {
			c, err := p.Verify(l.Proof(int64(i), 0, 2).Encode(), l.Entries[i])
			if err != nil || c.Size != int64(n) || c.Log.String() != l.Key.String() {
				t.Errorf("entry %d of %d: %+v, %v", i, n, c, err)
			}
		}
	}
}

func TestTextsHaveOneForm(t *testing.T) {
	l := filled(t, 5)
	proof := l.Proof(3, 0).Encode()
	parsed, err := translog.ParseProof(proof)
	if err != nil || !bytes.Equal(parsed.Encode(), proof) {
		t.Errorf("proof: %v", err)
	}
	for name, bad := range map[string]string{
		"extra data":        strings.Replace(string(proof), "\nindex", "\nextra AAAA\nindex", 1),
		"another version":   strings.Replace(string(proof), "@v1", "@v2", 1),
		"a leading zero":    strings.Replace(string(proof), "index 3", "index 03", 1),
		"a negative index":  strings.Replace(string(proof), "index 3", "index -3", 1),
		"a carriage return": strings.Replace(string(proof), "index 3\n", "index 3\r\n", 1),
		"a short hash":      strings.Replace(string(proof), "=\n", "\n", 1),
		"no checkpoint":     strings.SplitAfter(string(proof), "\n\n")[0][:40],
		"too long":          string(proof) + strings.Repeat("x", translog.MaxProof),
		"64 hashes":         "c2sp.org/tlog-proof@v1\nindex 0\n" + strings.Repeat(l.Whole().Checkpoint.Root.String()+"\n", 64) + "\nx",
	} {
		if _, err := translog.ParseProof([]byte(bad)); fault.CodeOf(err) != translog.CodeMalformed {
			t.Errorf("%s: %v", name, err)
		}
	}
	e := l.Entries[0]
	if again, err := translog.ParseEntry(e.Encode()); err != nil || again != e {
		t.Errorf("entry: %+v, %v", again, err)
	}
	for _, bad := range []string{"", string(e.Encode()) + "\n", strings.Replace(string(e.Encode()), "bytes ", "bytes 0", 1),
		strings.Replace(string(e.Encode()), "target ", "target ../", 1), strings.ToUpper(string(e.Encode()))} {
		if _, err := translog.ParseEntry([]byte(bad)); fault.CodeOf(err) != translog.CodeMalformed {
			t.Errorf("entry %q: %v", bad, err)
		}
	}
}

func TestPolicies(t *testing.T) {
	l := logsim.New(t, "example.org/log", 3)
	w := func(i int) string { return l.Witnesses[i].Witness().String() }
	head := fmt.Sprintf("log %s\nwitness a %s https://a.example/\nwitness b %s\nwitness c %s\n", l.Key, w(0), w(1), w(2))
	for _, tt := range []struct {
		name, text string
		least      int // -1: refused
	}{
		{"no witness", "log " + l.Key.String() + "\nquorum none\n", 0},
		{"one of them", head + "quorum b\n", 1},
		{"any", head + "group g any a b c\nquorum g\n", 1},
		{"all", head + "group g all a b c\nquorum g\n", 3},
		{"two of three, with comments and tabs", "# hello\n\t\n" + head + "\tgroup\tg 2 a b c \nquorum g\n", 2},
		{"groups of groups", head + "group g any a b\ngroup h all g c\nquorum h\n", 2},
		{"no log", "quorum none\n", -1},
		{"no quorum", head, -1},
		{"two quorums", head + "quorum a\nquorum b\n", -1},
		{"a quorum that is defined below", "log " + l.Key.String() + "\nquorum a\nwitness a " + w(0) + "\n", -1},
		{"one witness twice in a group", head + "group g 2 a a b\nquorum g\n", -1},
		{"one witness in two groups", head + "group g all a b\ngroup h all a c\ngroup i all g h\nquorum i\n", -1},
		{"one key under two names", head + "witness d " + w(0) + "\nquorum a\n", -1},
		{"one name for two keys", head + "witness a " + logsim.New(t, "x", 1).Witnesses[0].Witness().String() + "\nquorum a\n", -1},
		{"two logs of one origin", head + "log " + logsim.New(t, "example.org/log", 0).Key.String() + "\nquorum a\n", -1},
		{"more than there are", head + "group g 4 a b c\nquorum g\n", -1},
		{"zero", head + "group g 0 a b c\nquorum g\n", -1},
		{"none as a member", head + "group g 1 none a\nquorum g\n", -1},
		{"a witness key where a log's should be", "log " + w(0) + "\nquorum none\n", -1},
		{"a log key where a witness's should be", "log " + l.Key.String() + "\nwitness a " + logsim.New(t, "y", 0).Key.String() + "\nquorum a\n", -1},
		{"another key id", "log " + strings.Replace(l.Key.String(), "+", "+0", 1)[:20] + "\nquorum none\n", -1},
		{"a word that nobody knows", head + "quorum a\nextra x\n", -1},
		{"a carriage return", head + "quorum a\r\n", -1},
		{"an address that is none", "log " + l.Key.String() + "\nwitness a " + w(0) + " file:///etc\nquorum a\n", -1},
	} {
		p, err := translog.ParsePolicy(tt.text)
		switch {
		case tt.least < 0 && fault.CodeOf(err) != translog.CodePolicy:
			t.Errorf("%s: accepted, or %v", tt.name, err)
		case tt.least >= 0 && (err != nil || p.Least() != tt.least):
			t.Errorf("%s: least %v, %v", tt.name, p, err)
		}
	}
	for _, tt := range []struct {
		profile string
		need    int
		ok      bool
	}{{"lab", 0, true}, {"small", 0, false}, {"small", 1, true}, {"full", 1, false}, {"full", 2, true}, {"other", 3, false}} {
		if _, err := translog.Require(l.Policy(tt.need), tt.profile); (err == nil) != tt.ok {
			t.Errorf("profile %s with %d: %v", tt.profile, tt.need, err)
		}
	}
	if p, err := translog.Require("", "full"); p != nil || err != nil {
		t.Errorf("an anchor without a log: %v, %v", p, err)
	}
}

// TestEverySubsetOfWitnesses counts as the policy says, and in no other way.
func TestEverySubsetOfWitnesses(t *testing.T) {
	l := filled(t, 3)
	p := policy(t, l.Policy(2))
	for set := range 8 {
		var which []int
		for i := range 3 {
			if set&(1<<i) != 0 {
				which = append(which, i)
			}
		}
		_, err := p.Open(l.Cosign(l.Whole().Checkpoint.Signed, which...))
		if (err == nil) != (len(which) >= 2) || err != nil && fault.CodeOf(err) != translog.CodeQuorum {
			t.Errorf("witnesses %v: %v", which, err)
		}
	}
}

// TestCosignaturesAreThoseOfTheStandard: another implementation verifies ours,
// and we verify its.
func TestCosignaturesAreThoseOfTheStandard(t *testing.T) {
	secret := logsim.Secret(t, "witness.example/w1")
	ours, err := translog.ParseSecret(secret)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := formats.NewSignerForCosignatureV1(secret)
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := formats.NewVerifierForCosignatureV1(ours.Witness().String())
	if err != nil || verifier.KeyHash() != ours.Witness().KeyHash() {
		t.Fatalf("key %s: %v", ours.Witness(), err)
	}
	l := filled(t, 4)
	body := l.Whole().Checkpoint.Body()
	byUs := append(slices.Clone(l.Sign(body)), ours.Cosign(body, time.Now())...)
	if _, err := note.Open(byUs, note.VerifierList(verifier)); err != nil {
		t.Errorf("ours by them: %v", err)
	}
	byThem, err := note.Sign(&note.Note{Text: body}, l.Signer, theirs)
	if err != nil {
		t.Fatal(err)
	}
	p := policy(t, fmt.Sprintf("log %s\nwitness w %s\nquorum w\n", l.Key, ours.Witness()))
	if _, err := p.Open(byThem); err != nil {
		t.Errorf("theirs by us: %v", err)
	}
	// The time is signed too.
	line := ours.Cosign(body, time.Now())
	i := strings.LastIndex(line, " ") + 12
	flipped := []byte(line)
	flipped[i] ^= 1
	if _, err := p.Open(append(slices.Clone(l.Sign(body)), flipped...)); err == nil {
		t.Error("a cosignature of another time")
	}
}

// read serves a log from memory.
func read(l *logsim.Log) translog.Read {
	files := map[string][]byte{}
	for name, content := range l.Files() {
		files[strings.TrimPrefix(name, translog.Folder(l.Key)+"/")] = content
	}
	return func(_ context.Context, name string, limit int64) ([]byte, error) {
		b, ok := files[name]
		if !ok || int64(len(b)) > limit {
			return nil, fault.New(fault.NotFound, "missing", "no %s", name)
		}
		return b, nil
	}
}

func TestALogThatOnlyGrewExtendsWhatItWas(t *testing.T) {
	l := filled(t, 700)
	head := l.Whole().Checkpoint
	for _, n := range []int{0, 1, 2, 255, 256, 257, 511, 512, 513, 699, 700} {
		old := l.Fork()
		old.Entries = old.Entries[:n]
		if err := translog.Extends(t.Context(), read(l), head, old.Whole().Checkpoint); err != nil {
			t.Errorf("from %d: %v", n, err)
		}
		if n == 0 {
			continue
		}
		old.Entries[n-1].Bytes++
		if err := translog.Extends(t.Context(), read(l), head, old.Whole().Checkpoint); fault.CodeOf(err) != translog.CodeInconsistent {
			t.Errorf("from another history of %d: %v", n, err)
		}
		old.Entries[n-1].Bytes--
	}
	larger := filled(t, 701)
	larger.Origin = l.Origin
	if err := translog.Extends(t.Context(), read(l), head, larger.Whole().Checkpoint); fault.CodeOf(err) != translog.CodeRollback {
		t.Errorf("from a larger one: %v", err)
	}
	other := filled(t, 700)
	other.Entries[5].Bytes++
	small := l.Fork()
	small.Entries = small.Entries[:300]
	if err := translog.Extends(t.Context(), read(other), head, small.Whole().Checkpoint); fault.CodeOf(err) != translog.CodeTiles {
		t.Errorf("with the tiles of another log: %v", err)
	}
}

func TestAWholeLogIsReadAndComparedWithItsFiles(t *testing.T) {
	for _, n := range []int{0, 1, 256, 600} {
		l := filled(t, n)
		whole, err := translog.ReadLog(t.Context(), read(l), l.Whole().Checkpoint)
		if err != nil || !slices.Equal(whole.Entries, l.Entries) {
			t.Fatalf("%d entries: %v", n, err)
		}
		if err := whole.CheckFiles(t.Context(), read(l)); err != nil {
			t.Errorf("%d entries: %v", n, err)
		}
	}
	l := filled(t, 600)
	head := l.Whole().Checkpoint
	l.Entries[17].SHA256 = strings.Repeat("0", 64)
	if _, err := translog.ReadLog(t.Context(), read(l), head); fault.CodeOf(err) != translog.CodeTiles {
		t.Errorf("an entry that was changed: %v", err)
	}
}
