// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// TestEveryReaderHasATarget: the list names only targets that are there, and
// each of the readers that a fleet's trust depends on.
func TestEveryReaderHasATarget(t *testing.T) {
	readers, err := parseReaders(readersText)
	if err != nil {
		t.Fatal(err)
	}
	found, err := find("../..", readers)
	if err != nil {
		t.Fatal(err)
	}
	if len(found) <= len(readers) || found[0].reader == "" {
		t.Errorf("%d targets for %d readers, %+v first", len(found), len(readers), found[0])
	}
	for _, want := range []string{"metadata JSON", "custom part", "bundle", "module signature", "ELF policy", "/sys/kernel/notes", "tlog-proof", "policy:", "enrollment", "CVE"} {
		ok := false
		for _, r := range readers {
			ok = ok || r.star && strings.Contains(r.what, want)
		}
		if !ok {
			t.Errorf("no reader is called %s", want)
		}
	}
	if _, err := find("../..", map[target]reader{{pkg: "internal/none", name: "FuzzNone"}: {"x", true}}); err == nil {
		t.Error("a target that is not there was taken")
	}
}

// TestTimes: a star is a minute in CI, the rest some seconds, and without
// -others all are alike.
func TestTimes(t *testing.T) {
	star, plain, other := target{reader: "a", star: true}, target{reader: "b"}, target{}
	d := times{time.Minute, 3 * time.Second}
	if d.of(star) != time.Minute || d.of(plain) != 3*time.Second || d.of(other) != time.Minute {
		t.Error(d.of(star), d.of(plain), d.of(other))
	}
	d.others = 0
	if d.of(star) != time.Minute || d.of(plain) != time.Minute {
		t.Error(d.of(star), d.of(plain))
	}
}

func TestRead(t *testing.T) {
	const said = "fuzz: elapsed: 0s, gathering baseline coverage: 0/3 completed\nfuzz: elapsed: 3s, execs: 102 (34/sec), new interesting: 2 (total: 5)\n" +
		"fuzz: elapsed: 4s, execs: 130 (28/sec), new interesting: 3 (total: 6)\nPASS\n"
	o := read(said, nil, 4*time.Second)
	if row := o.row(target{pkg: "a", name: "FuzzB", reader: "c"}); row != "| c | `FuzzB` in `a` | 130 | 34 | 6 | 4 | nothing found |" {
		t.Error(row)
	}
	if o := read("--- FAIL: FuzzB", errors.New("exit status 1"), 0); !o.failed || !strings.Contains(o.row(target{}), "failed") {
		t.Errorf("%+v", o)
	}
}
