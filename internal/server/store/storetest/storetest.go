// SPDX-License-Identifier: Apache-2.0

// Package storetest is the conformance suite of package store: every
// implementation runs it. Tests only.
package storetest

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/server/store"
	"klatch/internal/wire"
)

var start = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

// Facts are of a machine that runs a stock kernel.
func Facts(hostname string) wire.Facts {
	id, err := kernel.ParseBuildID("0123456789abcdef0123456789abcdef01234567")
	if err != nil {
		panic(err)
	}
	return wire.Facts{
		Hostname: hostname, BootID: "b", Lockdown: "none", Enforced: "no", Version: "0.1.0",
		Kernel: kernel.Build{Distro: "debian-12", Arch: "amd64", Release: "6.1.0-50-cloud-amd64", ID: id},
	}
}

// MachineID makes the n-th machine id of a test.
func MachineID(n int) string { return fmt.Sprintf("mch_%026d", n) }

// Run checks one implementation. open gives an empty store that is closed by
// the end of the test.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	for name, test := range map[string]func(*testing.T, store.Store){
		"an unknown machine is added at its first sighting": unknownMachine,
		"a late report does not replace a newer state":      lateReport,
		"a report counts once":                              reportOnce,
		"machines are listed in pages":                      machinePages,
		"reports are listed in pages, newest first":         reportPages,
		"a machine cannot fill the disk with reports":       reportFlood,
		"a token is used up":                                tokenUsedUp,
		"a token expires":                                   tokenExpires,
		"a lost answer can be asked for again":              lostAnswer,
		"many machines race for one token":                  race,
		"a token for mirrors makes a mirror and no machine": mirrorToken,
		"a mirror is seen, removed, and stays removed":      mirrorRemoved,
	} {
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func code(t *testing.T, err error, want fault.Code) {
	t.Helper()
	if fault.CodeOf(err) != want {
		t.Errorf("code %q, want %q: %v", fault.CodeOf(err), want, err)
	}
}

func sighting(n int, at time.Time, sequence livepatch.Sequence) store.Sighting {
	return store.Sighting{
		MachineID: MachineID(n), Tier: "stable", Seen: at, StateAt: at, Facts: Facts(fmt.Sprintf("host-%d", n)),
		State: wire.State{State: "protected", Sequence: sequence, Fixes: []livepatch.Fix{{CVE: "CVE-2026-0001", Check: livepatch.Passed}}},
	}
}

func unknownMachine(t *testing.T, s store.Store) {
	_, err := s.Machine(t.Context(), MachineID(1))
	code(t, err, "machine_unknown")
	x := sighting(1, start, 3)
	must(t, s.Seen(t.Context(), x))
	got, err := s.Machine(t.Context(), MachineID(1))
	must(t, err)
	want := store.Machine{ID: MachineID(1), Tier: "stable", Enrolled: start, LastSeen: start, StateAt: start, State: x.State, Facts: x.Facts}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func lateReport(t *testing.T, s store.Store) {
	must(t, s.Seen(t.Context(), sighting(1, start, 3)))
	late := sighting(1, start.Add(-time.Hour), 2)
	late.Seen = start.Add(time.Hour)
	fresh, err := s.AddReport(t.Context(), late, wire.Report{Key: "k", At: late.StateAt, Facts: late.Facts})
	must(t, err)
	m, err := s.Machine(t.Context(), MachineID(1))
	must(t, err)
	if !fresh || m.State.Sequence != 3 || !m.LastSeen.Equal(late.Seen) || !m.StateAt.Equal(start) {
		t.Errorf("fresh %v, machine %+v", fresh, m)
	}
	must(t, s.Seen(t.Context(), sighting(1, start.Add(2*time.Hour), 4)))
	if m, err = s.Machine(t.Context(), MachineID(1)); err != nil || m.State.Sequence != 4 {
		t.Errorf("machine %+v, %v", m, err)
	}
}

func reportFlood(t *testing.T, s store.Store) {
	honest := sighting(2, start, 3)
	_, err := s.AddReport(t.Context(), honest, wire.Report{Key: "k", Facts: honest.Facts})
	must(t, err)
	x := sighting(1, start, 3)
	for n := range store.MaxReports + 3 {
		_, err := s.AddReport(t.Context(), x, wire.Report{Key: fmt.Sprint(n), Facts: x.Facts})
		must(t, err)
	}
	list, err := s.Reports(t.Context(), MachineID(1), 0, store.MaxPage)
	must(t, err)
	if len(list) != store.MaxReports || list[0].Report.Key != fmt.Sprint(store.MaxReports+2) {
		t.Errorf("%d reports are kept, want the newest %d", len(list), store.MaxReports)
	}
	if list, err = s.Reports(t.Context(), MachineID(2), 0, 0); err != nil || len(list) != 1 {
		t.Errorf("%d reports of another machine are left, %v", len(list), err)
	}
}

func reportOnce(t *testing.T, s store.Store) {
	x := sighting(1, start, 3)
	r := wire.Report{Key: "key-1", Event: wire.EventConfirmed, At: start, Sequence: 3, State: x.State, Facts: x.Facts}
	for i, want := range []bool{true, false, false} {
		x.Seen = start.Add(time.Duration(i) * time.Minute)
		x.State.Sequence = livepatch.Sequence(3 + i)
		fresh, err := s.AddReport(t.Context(), x, r)
		must(t, err)
		if fresh != want {
			t.Errorf("time %d: fresh %v", i, fresh)
		}
	}
	other := sighting(2, start, 3)
	if fresh, err := s.AddReport(t.Context(), other, wire.Report{Key: "key-1", Facts: other.Facts}); err != nil || !fresh {
		t.Errorf("the same key of another machine: %v, %v", fresh, err)
	}
	m, err := s.Machine(t.Context(), MachineID(1))
	must(t, err)
	if m.State.Sequence != 3 || !m.LastSeen.Equal(start.Add(2*time.Minute)) {
		t.Errorf("a repetition changed the machine: %+v", m)
	}
	list, err := s.Reports(t.Context(), MachineID(1), 0, 0)
	must(t, err)
	if len(list) != 1 {
		t.Fatalf("%d reports", len(list))
	}
	if d := cmp.Diff(r, list[0].Report); d != "" {
		t.Error(d)
	}
}

func machinePages(t *testing.T, s store.Store) {
	for _, n := range []int{3, 1, 5, 2, 4} {
		must(t, s.Seen(t.Context(), sighting(n, start, 1)))
	}
	var got []string
	for after := ""; ; {
		page, err := s.Machines(t.Context(), after, 2)
		must(t, err)
		if len(page) == 0 {
			break
		}
		for _, m := range page {
			got = append(got, m.ID)
		}
		after = got[len(got)-1]
	}
	if d := cmp.Diff([]string{MachineID(1), MachineID(2), MachineID(3), MachineID(4), MachineID(5)}, got); d != "" {
		t.Error(d)
	}
}

func reportPages(t *testing.T, s store.Store) {
	for n := range 5 {
		x := sighting(n%2, start, 1)
		_, err := s.AddReport(t.Context(), x, wire.Report{Key: fmt.Sprint(n), Facts: x.Facts})
		must(t, err)
	}
	first, err := s.Reports(t.Context(), "", 0, 3)
	must(t, err)
	rest, err := s.Reports(t.Context(), "", first[2].ID, 3)
	must(t, err)
	var keys strings.Builder
	for _, r := range append(first, rest...) {
		keys.WriteString(r.Report.Key)
	}
	if keys.String() != "43210" {
		t.Errorf("order %s", &keys)
	}
	one, err := s.Reports(t.Context(), MachineID(1), 0, 0)
	must(t, err)
	if len(one) != 2 || one[0].Report.Key != "3" {
		t.Errorf("reports of one machine: %+v", one)
	}
}

func newMachine(n int, at time.Time) store.Machine {
	return store.Machine{ID: MachineID(n), KeyDigest: fmt.Sprintf("key-%d", n), Enrolled: at, Facts: Facts(fmt.Sprint("host-", n))}
}

func token(uses int) store.Token {
	return store.Token{Digest: "d", Tier: "canary", Created: start, Expires: start.Add(24 * time.Hour), Uses: uses}
}

func tokenUsedUp(t *testing.T, s store.Store) {
	must(t, s.AddToken(t.Context(), token(2)))
	code(t, s.AddToken(t.Context(), token(2)), "token_exists")
	_, err := s.Redeem(t.Context(), "other", newMachine(1, start))
	code(t, err, "token_unknown")
	for n := range 2 {
		m, err := s.Redeem(t.Context(), "d", newMachine(n, start))
		must(t, err)
		if m.Tier != "canary" {
			t.Errorf("tier %q", m.Tier)
		}
	}
	_, err = s.Redeem(t.Context(), "d", newMachine(3, start))
	code(t, err, "token_used")
	if fault.KindOf(err) != fault.Denied {
		t.Errorf("kind %q", fault.KindOf(err))
	}
	if _, err = s.Machine(t.Context(), MachineID(3)); fault.CodeOf(err) != "machine_unknown" {
		t.Errorf("the third machine was added: %v", err)
	}
	if m, err := s.Machine(t.Context(), MachineID(1)); err != nil || m.Tier != "canary" || m.KeyDigest != "key-1" || m.Facts.Hostname != "host-1" {
		t.Errorf("machine %+v, %v", m, err)
	}
	list, err := s.Tokens(t.Context(), start)
	must(t, err)
	want := token(2)
	want.Used, want.Role = 2, store.ForMachine
	if d := cmp.Diff([]store.Token{want}, list); d != "" {
		t.Error(d)
	}
}

func tokenExpires(t *testing.T, s store.Store) {
	must(t, s.AddToken(t.Context(), token(1)))
	_, err := s.Redeem(t.Context(), "d", newMachine(1, start.Add(24*time.Hour)))
	code(t, err, "token_expired")
	if list, err := s.Tokens(t.Context(), start.Add(24*time.Hour)); err != nil || len(list) != 0 {
		t.Errorf("tokens %+v, %v", list, err)
	}
	_, err = s.Redeem(t.Context(), "d", newMachine(1, start.Add(24*time.Hour-time.Millisecond)))
	must(t, err)
}

func lostAnswer(t *testing.T, s store.Store) {
	must(t, s.AddToken(t.Context(), token(1)))
	_, err := s.Redeem(t.Context(), "d", newMachine(1, start))
	must(t, err)
	again := newMachine(1, start.Add(time.Minute))
	again.ID = MachineID(9)
	m, err := s.Redeem(t.Context(), "d", again)
	must(t, err)
	if m.ID != MachineID(1) {
		t.Errorf("a second machine %s was added", m.ID)
	}
	_, err = s.Redeem(t.Context(), "d", newMachine(2, start))
	code(t, err, "token_used")
}

func race(t *testing.T, s store.Store) {
	must(t, s.AddToken(t.Context(), token(3)))
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for n := range 12 {
		wg.Go(func() {
			_, err := s.Redeem(t.Context(), "d", newMachine(n, start))
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			} else if fault.CodeOf(err) != "token_used" {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if list, err := s.Machines(t.Context(), "", 0); err != nil || won != 3 || len(list) != 3 {
		t.Errorf("%d won, %d machines, %v", won, len(list), err)
	}
}

// MirrorID makes the n-th mirror id of a test.
func MirrorID(n int) string { return fmt.Sprintf("mir_%026d", n) }

func mirrorToken(t *testing.T, s store.Store) {
	for digest, role := range map[string]store.Role{"for-mirrors": store.ForMirror, "for-machines": ""} {
		must(t, s.AddToken(t.Context(), store.Token{Digest: digest, Role: role, Tier: "stable", Created: start, Expires: start.Add(time.Hour), Uses: 1}))
	}
	mirror := func(n int, key string) store.Mirror {
		return store.Mirror{ID: MirrorID(n), Name: "site", KeyDigest: key, Joined: start.Add(time.Minute)}
	}
	_, err := s.RedeemMirror(t.Context(), "for-machines", mirror(1, "k1"))
	code(t, err, "token_role")
	_, err = s.Redeem(t.Context(), "for-mirrors", store.Machine{ID: MachineID(1), KeyDigest: "k1", Enrolled: start})
	code(t, err, "token_role")
	_, err = s.RedeemMirror(t.Context(), "no-such", mirror(1, "k1"))
	code(t, err, "token_unknown")
	first, err := s.RedeemMirror(t.Context(), "for-mirrors", mirror(1, "k1"))
	must(t, err)
	again, err := s.RedeemMirror(t.Context(), "for-mirrors", mirror(2, "k1"))
	if err != nil || again.ID != first.ID {
		t.Errorf("a lost answer: %+v, %v", again, err)
	}
	_, err = s.RedeemMirror(t.Context(), "for-mirrors", mirror(3, "k2"))
	code(t, err, "token_used")
	late := mirror(4, "k1")
	late.Joined = start.Add(time.Hour)
	_, err = s.RedeemMirror(t.Context(), "for-mirrors", late)
	code(t, err, "token_expired")
	list, err := s.Mirrors(t.Context())
	if err != nil || len(list) != 1 || list[0] != (store.Mirror{ID: MirrorID(1), Name: "site", KeyDigest: "k1", Joined: start.Add(time.Minute), LastSeen: start.Add(time.Minute)}) {
		t.Errorf("%+v, %v", list, err)
	}
	if m, err := s.Machines(t.Context(), "", 10); err != nil || len(m) != 0 {
		t.Errorf("machines: %+v, %v", m, err)
	}
	tokens, err := s.Tokens(t.Context(), start)
	if err != nil || len(tokens) != 2 || tokens[0].Role == tokens[1].Role {
		t.Errorf("tokens: %+v, %v", tokens, err)
	}
}

func mirrorRemoved(t *testing.T, s store.Store) {
	// One that this store forgot is known by its certificate.
	must(t, s.MirrorSeen(t.Context(), MirrorID(7), start))
	must(t, s.MirrorSeen(t.Context(), MirrorID(7), start.Add(time.Hour)))
	must(t, s.MirrorSeen(t.Context(), MirrorID(7), start.Add(time.Minute)))
	code(t, s.RemoveMirror(t.Context(), MirrorID(8), start), "mirror_unknown")
	must(t, s.RemoveMirror(t.Context(), MirrorID(7), start.Add(2*time.Hour)))
	must(t, s.RemoveMirror(t.Context(), MirrorID(7), start.Add(9*time.Hour)))
	for range 2 {
		code(t, s.MirrorSeen(t.Context(), MirrorID(7), start.Add(3*time.Hour)), "mirror_removed")
	}
	list, err := s.Mirrors(t.Context())
	if err != nil || len(list) != 1 || !list[0].LastSeen.Equal(start.Add(time.Hour)) || !list[0].Removed.Equal(start.Add(2*time.Hour)) {
		t.Errorf("%+v, %v", list, err)
	}
}
