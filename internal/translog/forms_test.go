// SPDX-License-Identifier: Apache-2.0

package translog_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/testkit/logsim"
	"klatch/internal/translog"
)

// vkey writes a verifier key whose id is right, whatever is in it.
func vkey(name string, raw []byte) string {
	sum := sha256.Sum256(append([]byte(name+"\n"), raw...))
	return fmt.Sprintf("%s+%x+%s", name, sum[:4], base64.StdEncoding.EncodeToString(raw))
}

// TestEachConditionOnAKeyCounts: all else about these keys is right.
func TestEachConditionOnAKeyCounts(t *testing.T) {
	public := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))[ed25519.SeedSize:]
	typed := func(kind byte, key []byte) []byte { return append([]byte{kind}, key...) }
	good := vkey("a.example", typed(4, public))
	if v, err := translog.ParseWitnessKey(good); err != nil || v.String() != good {
		t.Fatalf("%v, %v", v, err)
	}
	for name, bad := range map[string]string{
		"no name":        vkey("", typed(4, public)),
		"a space":        vkey("a b", typed(4, public)),
		"too long":       vkey(strings.Repeat("a", 256), typed(4, public)),
		"two parts":      "a.example+00000000",
		"no base64":      "a.example+00000000+!!!",
		"nothing":        vkey("a.example", nil),
		"type 1":         vkey("a.example", typed(1, public)),
		"a byte more":    vkey("a.example", typed(4, append(bytes.Clone(public), 0))),
		"a byte less":    vkey("a.example", typed(4, public[:31])),
		"ML-DSA-44":      vkey("a.example", typed(6, make([]byte, 1312))),
		"another id":     strings.Replace(good, good[10:18], "00000000", 1),
		"capitals in id": strings.Replace(good, good[10:18], strings.ToUpper(good[10:18])+"", 1) + " ",
	} {
		if _, err := translog.ParseWitnessKey(bad); fault.CodeOf(err) != translog.CodePolicy {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := translog.ParseWitnessKey(vkey("a.example", typed(6, make([]byte, 1312)))); fault.HintOf(err) == "" || !strings.Contains(err.Error(), "ML-DSA") {
		t.Errorf("ML-DSA-44 is refused without saying so: %v", err)
	}
}

// TestEachConditionOnACheckpointCounts: the log's own key has signed them all,
// and no witness is asked.
func TestEachConditionOnACheckpointCounts(t *testing.T) {
	l := filled(t, 3)
	p := policy(t, l.Policy(0))
	c := l.Whole().Checkpoint
	root := c.Root.String()
	for name, tt := range map[string]struct {
		text string
		code fault.Code
	}{
		"two lines":         {l.Origin + "\n3\n", translog.CodeMalformed},
		"an extension":      {c.Body() + "more\n", translog.CodeMalformed},
		"no origin":         {"\n3\n" + root + "\n", translog.CodeMalformed},
		"an origin, spaced": {"example.org log\n3\n" + root + "\n", translog.CodeMalformed},
		"another origin":    {"example.org/other\n3\n" + root + "\n", translog.CodeOrigin},
		"no number":         {l.Origin + "\nthree\n" + root + "\n", translog.CodeMalformed},
		"a leading zero":    {l.Origin + "\n03\n" + root + "\n", translog.CodeMalformed},
		"a plus":            {l.Origin + "\n+3\n" + root + "\n", translog.CodeMalformed},
		"below zero":        {l.Origin + "\n-3\n" + root + "\n", translog.CodeMalformed},
		"more than can be":  {l.Origin + "\n9223372036854775807\n" + root + "\n", translog.CodeMalformed},
		"a short root":      {l.Origin + "\n3\n" + root[:40] + "\n", translog.CodeMalformed},
		"a root, spaced":    {l.Origin + "\n3\n" + root + " \n", translog.CodeMalformed},
		"a root, bits left": {l.Origin + "\n3\n" + root[:42] + "B=\n", translog.CodeMalformed},
		"too long":          {c.Body() + strings.Repeat("x", translog.MaxCheckpoint) + "\n", translog.CodeMalformed},
	} {
		_, err := p.OpenUnwitnessed(l.Sign(tt.text))
		if fault.CodeOf(err) != tt.code || name == "too long" && !strings.Contains(err.Error(), "limit") {
			t.Errorf("%s: %v, want %s", name, err, tt.code)
		}
	}
	stranger := filled(t, 3)
	if _, err := p.Open(stranger.Whole().Checkpoint.Signed); fault.CodeOf(err) != translog.CodeUntrusted || fault.HintOf(err) == "" {
		t.Errorf("signed by a stranger: %v", err)
	}
	// A witness of the policy has signed it, the log has not.
	noLog := stranger.Fork()
	noLog.Witnesses = l.Witnesses
	if _, err := p.Open(noLog.Cosign(noLog.Whole().Checkpoint.Signed, 0, 1)); fault.CodeOf(err) != translog.CodeUntrusted {
		t.Errorf("signed by witnesses only: %v", err)
	}
	broken := bytes.Clone(c.Signed)
	if at := len(broken) - 6; broken[at] == 'A' { // a letter of base64, whatever it was
		broken[at] = 'B'
	} else {
		broken[at] = 'A'
	}
	if _, err := p.Open(broken); fault.CodeOf(err) != translog.CodeUntrusted {
		t.Errorf("a broken signature: %v", err)
	}
	if _, err := p.Open([]byte("hello")); fault.CodeOf(err) != translog.CodeMalformed {
		t.Errorf("no note: %v", err)
	}
	// Two logs in the policy, each with its own name.
	other := logsim.New(t, "example.org/other", 0)
	both := policy(t, l.Policy(0)+"log "+other.Key.String()+"\n")
	swapped := l.Fork()
	swapped.Origin = other.Origin
	if _, err := both.Open(swapped.Whole().Checkpoint.Signed); fault.CodeOf(err) != translog.CodeOrigin {
		t.Errorf("one log under the other's name: %v", err)
	}
}

func TestEachConditionOnASubmissionAndAnEntryCounts(t *testing.T) {
	root := filled(t, 1).Whole().Checkpoint.Root.String()
	for _, bad := range []string{"", "old 1", "new 1\n\nx", "old x\n\nx", "old 01\n\nx", "old 1\nhash\n\nx",
		"old 1\n" + strings.Repeat(root+"\n", 64) + "\nx", "old 1\n\n" + strings.Repeat("x", translog.MaxSubmission)} {
		if _, err := translog.ParseSubmission([]byte(bad)); fault.CodeOf(err) != translog.CodeMalformed {
			t.Errorf("submission %.40q: %v", bad, err)
		}
	}
	entry := func(format, target, size, sum, end string) string {
		return format + "\ntarget " + target + "\nbytes " + size + "\nsha256 " + sum + end
	}
	sum := strings.Repeat("a", 64)
	if _, err := translog.ParseEntry([]byte(entry("klatch-log-entry/1", "a/b", "1", sum, "\n"))); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{
		entry("klatch-log-entry/2", "a/b", "1", sum, "\n"), entry("klatch-log-entry/1", "a/b", "1", sum, "\nx"),
		entry("klatch-log-entry/1", strings.Repeat("a", 513), "1", sum, "\n"), entry("klatch-log-entry/1", strings.Repeat("a", 1024), "1", sum, "\n"),
		entry("klatch-log-entry/1", "a//b", "1", sum, "\n"), entry("klatch-log-entry/1", "a/b", "-1", sum, "\n"),
		entry("klatch-log-entry/1", "a/b", "1", strings.Repeat("A", 64), "\n"), entry("klatch-log-entry/1", "a/b", "1", sum[1:], "\n"),
	} {
		if _, err := translog.ParseEntry([]byte(bad)); fault.CodeOf(err) != translog.CodeMalformed {
			t.Errorf("entry %.80q: %v", bad, err)
		}
	}
}

func TestEachConditionOnAPolicyCounts(t *testing.T) {
	l := logsim.New(t, "example.org/log", 33)
	log := "log " + l.Key.String() + "\n"
	w := func(i int, url string) string {
		return fmt.Sprintf("witness w%d %s %s\n", i, l.Witnesses[i].Witness(), url)
	}
	var many, groups, logs strings.Builder
	for i := range 33 {
		logs.WriteString("log " + logsim.New(t, fmt.Sprintf("l%d.example", i), 0).Key.String() + "\n")
	}
	for i := range 33 {
		many.WriteString(w(i, ""))
	}
	for i := range 32 {
		fmt.Fprintf(&groups, "group g%d 1 w%d\n", i, i)
	}
	most := log + strings.Join(strings.SplitAfter(many.String(), "\n")[:32], "")
	if _, err := translog.ParsePolicy(most + groups.String() + "quorum g3\n"); err != nil {
		t.Errorf("32 witnesses and groups: %v", err)
	}
	for name, bad := range map[string]string{
		"33 witnesses":         log + many.String() + "quorum none\n",
		"33 groups":            most + groups.String() + "group x 1 g0\nquorum none\n",
		"too long":             log + "quorum none\n# " + strings.Repeat("x", translog.MaxPolicy),
		"a control character":  log + "quorum none\n# \x01\n",
		"a deleted character":  log + "quorum none\n# \x7f\n",
		"an address, broken":   log + w(0, "http://%zz") + "quorum none\n",
		"an address, no host":  log + w(0, "https:///x") + "quorum none\n",
		"an address, ftp":      log + w(0, "ftp://x.example") + "quorum none\n",
		"a need in words":      log + w(0, "") + "group g two w0\nquorum none\n",
		"a need, zero ahead":   log + w(0, "") + "group g 01 w0\nquorum none\n",
		"a group's name taken": log + w(0, "") + w(1, "") + "group w0 1 w1\nquorum none\n",
		"an unknown member":    log + w(0, "") + "group g 1 w7\nquorum none\n",
		"a group in itself":    log + w(0, "") + "group g 1 g\nquorum none\n",
		"one key, two vkeys":   log + "witness a " + vkey("a.example", append([]byte{4}, make([]byte, 32)...)) + "\nwitness b " + vkey("b.example", append([]byte{4}, make([]byte, 32)...)) + "\nquorum none\n",
		"33 logs":              logs.String() + "quorum none\n",
		"one key, two names":   log + w(0, "") + strings.Replace(w(0, ""), "w0", "x0", 1) + "quorum none\n",
	} {
		if _, err := translog.ParsePolicy(bad); fault.CodeOf(err) != translog.CodePolicy {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := translog.Require("hello", "lab"); fault.CodeOf(err) != translog.CodePolicy || fault.KindOf(err) != fault.Untrusted {
		t.Errorf("an anchor with another text: %v", err)
	}
}

func TestALogOfAnotherNameIsNotTheSame(t *testing.T) {
	a, b := filled(t, 2), filled(t, 3)
	b.Origin = "example.org/other"
	if err := translog.Extends(t.Context(), read(a), a.Whole().Checkpoint, b.Whole().Checkpoint); fault.CodeOf(err) != translog.CodeOrigin {
		t.Errorf("%v", err)
	}
	whole := a.Whole()
	for _, size := range []int64{-1, 3} {
		if _, err := whole.RootAt(size); fault.CodeOf(err) != translog.CodeRollback {
			t.Errorf("root at %d: %v", size, err)
		}
	}
	c := whole.Checkpoint
	c.Size = 1 << 30
	if _, err := translog.ReadLog(t.Context(), read(a), c); fault.CodeOf(err) != translog.CodeMalformed {
		t.Errorf("a log of a billion entries: %v", err)
	}
}

// TestABundleOfEntriesThatIsCutIsRefused at each length.
func TestABundleOfEntriesThatIsCutIsRefused(t *testing.T) {
	l := filled(t, 2)
	whole, head := read(l), l.Whole().Checkpoint
	full, err := whole(t.Context(), "tile/entries/000.p/2", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	for n := range full {
		cut := func(context.Context, string, int64) ([]byte, error) { return full[:n:n], nil }
		if _, err := translog.ReadLog(t.Context(), cut, head); fault.CodeOf(err) != translog.CodeMalformed {
			t.Errorf("%d of %d bytes: %v", n, len(full), err)
		}
	}
}
