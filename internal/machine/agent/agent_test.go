// SPDX-License-Identifier: Apache-2.0

package agent

//go:generate go test -run "TestDiagram|TestStates|TestEveryState" . -update

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/bootkeys"
	"klatch/internal/machine/facts"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/notice"
	"klatch/internal/stall"
	"klatch/internal/wire"
)

var update = flag.Bool("update", false, "write generated files and golden files")

const docs = "../../../docs"

// golden compares a generated text with the committed one.
func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, got, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not what the code says; write it again with: go test ./internal/machine/agent -update\n%s", path, got)
	}
}

var phases = []wire.Phase{wire.Idle, wire.Staged, wire.Loading, wire.Transitioning, wire.Stalled, wire.Soaking, wire.Confirmed, wire.Suspect, wire.Failed}

func TestDiagramIsThatOfTheEdges(t *testing.T) {
	var b bytes.Buffer
	fmt.Fprintln(&b, "// The journey of one machine. Generated from edges in internal/machine/agent;\n// write it again with: go test ./internal/machine/agent -update")
	fmt.Fprintln(&b, "digraph agent {\n\trankdir=LR;\n\tnode [shape=box, style=rounded];")
	for _, from := range phases {
		for _, to := range edges[from] {
			fmt.Fprintf(&b, "\t%s -> %s;\n", from, to)
		}
	}
	fmt.Fprintln(&b, "}")
	golden(t, docs+"/diagrams/agent.dot", b.Bytes())
}

func TestEveryPhaseCanBeEnteredAndLeft(t *testing.T) {
	if len(edges) != len(phases) {
		t.Errorf("%d phases have edges, want %d", len(edges), len(phases))
	}
	for _, p := range phases {
		if len(edges[p]) == 0 {
			t.Errorf("no way out of %s", p)
		}
		if !slices.ContainsFunc(phases, func(from wire.Phase) bool { return slices.Contains(edges[from], p) }) {
			t.Errorf("no way into %s", p)
		}
	}
}

func TestStatesAreDocumented(t *testing.T) {
	var b bytes.Buffer
	fmt.Fprint(&b, `# States of a machine

The one word of `+"`klatch status`"+`, of `+"`klatch status --json`"+` (member `+"`state.state`"+`) and of the server's pages. The first
that applies wins. Every state has one reason code (`+"`state.reason`"+`), a text and one next step; the raw
axes stand beside it. `+"`klatch status --check`"+` exits with 4 where a person must act, and wherever a reboot is
required.

Generated from `+"`States` in `internal/machine/agent/state.go`"+`; write it again with
`+"`go test ./internal/machine/agent -update`"+`.

| state | a person must act | meaning | next step |
| --- | --- | --- | --- |
`)
	for _, m := range States {
		act := "no"
		if m.Act {
			act = "yes"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", m.Word, act, m.Meaning, m.Next)
	}
	fmt.Fprint(&b, "\n## Reason codes\n\n")
	fmt.Fprint(&b, "A reason that has no better one is the state's own word. The others, as the tests reach them; codes of the loader,\n"+
		"the metadata and the server are passed on as they are.\n\n| state | reason |\n| --- | --- |\n")
	var lines []string
	for _, tt := range stateTable() {
		line := fmt.Sprintf("| `%s` | `%s` |\n", tt.word, tt.reason)
		if !slices.Contains(lines, line) {
			lines = append(lines, line)
		}
	}
	b.WriteString(strings.Join(lines, ""))
	golden(t, docs+"/reference/states.md", b.Bytes())
}

// TestOrderIsDocumented keeps the table in the explanation equal to Order, and
// klatchd's part of it to what klatchd does.
func TestOrderIsDocumented(t *testing.T) {
	var b bytes.Buffer
	fmt.Fprint(&b, "| step | who | class | what must hold |\n| --- | --- | --- | --- |\n")
	for _, p := range Order {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", p.Step, p.By, p.Class, p.What)
	}
	const file, from, to = docs + "/explanation/trust-on-the-machine.md", "<!-- order, generated -->\n", "<!-- end -->"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(text), from)
	_, tail, ok2 := strings.Cut(rest, to)
	if !ok || !ok2 {
		t.Fatalf("%s has no marks for the table", file)
	}
	golden(t, file, []byte(head+from+b.String()+to+tail))

	place := func(s Step) int { return slices.IndexFunc(Order, func(p Place) bool { return p.Step == s }) }
	last := -1
	for _, c := range order() {
		i := place(c.step)
		if i < 0 || !strings.HasPrefix(Order[i].By, "klatchd") {
			t.Errorf("klatchd checks %s, which Order does not say", c.step)
		}
		if c.step == StepMemory || c.step == StepSelection {
			continue // a halt is looked for late, and the server is asked early
		}
		if i < last {
			t.Errorf("%s comes later than Order says", c.step)
		}
		last = i
	}
}

var now = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

// healthy is a machine that has confirmed livepatch 3 and checked an hour ago.
func healthy() inputs {
	build := kernel.Build{Distro: "debian-12", Arch: "amd64", Release: "6.1.0-50-cloud-amd64", ID: kernel.BuildID{0xca, 0xfe}}
	fixes := []livepatch.Fix{{CVE: "CVE-2026-0001", Check: livepatch.Passed}, {CVE: "CVE-2026-0002", Check: livepatch.Unchecked}}
	return inputs{
		enrolled: true, policy: DefaultPolicy(), now: now,
		j: journal{
			Phase: wire.Idle, Since: now.Add(-2 * time.Hour),
			Check: Check{At: now.Add(-time.Hour), GoodAt: now.Add(-time.Hour), Result: resultCurrent, Code: "current"},
		},
		o: observation{
			Facts:   wire.Facts{Hostname: "db1", Kernel: build, BootID: "boot-1"},
			Kernels: facts.Kernels{build.Release},
			In:      []facts.Livepatch{{Name: "klatch_3", Enabled: true, Patched: true}},
			Loader: &loaderapi.Status{
				Highest: 3, Loaded: &loaderapi.Loaded{Sequence: 3, Enabled: true, Patched: true, Fixes: fixes},
				Boot: loaderapi.BootState{Outcome: "nothing_stored"},
			},
		},
	}
}

// nothingLoaded takes the livepatch out of a machine.
func nothingLoaded(in *inputs) {
	in.o.In, in.o.Loader.Loaded, in.o.Loader.Highest = nil, nil, 0
}

// underWayAt puts livepatch 4 on its way over livepatch 3.
func underWayAt(p wire.Phase, change func(*work)) func(*inputs) {
	return func(in *inputs) {
		in.j.Phase, in.j.Since = p, now.Add(-5*time.Minute)
		in.j.Work = &work{Kernel: in.o.Facts.Kernel, Sequence: 4, Began: now.Add(-10 * time.Second)}
		if change != nil {
			change(in.j.Work)
		}
	}
}

func bootOutcome(outcome string) func(*inputs) {
	return func(in *inputs) {
		in.o.In, in.o.Loader.Loaded = nil, nil
		in.o.Loader.Boot = loaderapi.BootState{Outcome: outcome}
	}
}

// tells is a publisher's notice on the running kernel.
func tells(s notice.Support, cves ...notice.CVE) func(*inputs) {
	return func(in *inputs) {
		in.notice = &notice.Notice{Format: notice.Format, Kernel: in.o.Facts.Kernel, Support: s, CVEs: cves}
	}
}

type stateCase struct {
	name   string
	change func(*inputs)
	word   string
	reason fault.Code
	text   string // part of it
	act    bool
}

// stateTable reaches every state.
func stateTable() []stateCase {
	return []stateCase{
		{"live patched", func(*inputs) {}, "confirmed", "live_patched", "livepatch 3 with 2 fixes", false},
		{"live patched and a newer kernel waits", func(in *inputs) { in.o.Kernels = facts.Kernels{"6.1.0-56-cloud-amd64", in.o.Facts.Kernel.Release} },
			"confirmed", "live_patched", "", false},
		{"the server was missed once", func(in *inputs) {
			in.j.Check.Result, in.j.Check.Code, in.j.Check.Kind = resultFailed, "server_unavailable", fault.Unavailable
		}, "confirmed", "live_patched", "", false},
		{"the kernel is unknown", func(in *inputs) {
			in.o.FactsErr = fault.New(fault.Internal, "build_unknown", "identify the running kernel: no notes")
		}, "kernel_unknown", "build_unknown", "no notes", true},
		{"the log has two histories", func(in *inputs) { in.o.Halt = &Halt{Text: "log acme/log has two histories"} }, "halted", "log_inconsistent", "two histories", true},
		{"no anchor", func(in *inputs) { in.o.AnchorErr = fault.New(fault.NotFound, "no_anchor", "no trust anchor") }, "no_anchor", "no_anchor", "", true},
		{"lab keys that nobody allowed", func(in *inputs) {
			in.o.AnchorErr = fault.New(fault.Untrusted, "lab_keys", "lab keys").WithHint("klatch trust allow-lab")
		}, "no_anchor", "lab_keys", "", true},
		{"not enrolled", func(in *inputs) { in.enrolled = false }, "not_enrolled", "not_enrolled", "", true},
		{"staged", underWayAt(wire.Staged, nil), "staged", "staged", "livepatch 4 is verified", false},
		{"staged and the loader is away", underWayAt(wire.Staged, func(w *work) {
			w.After, w.Code, w.Text = now.Add(time.Minute), "loader_unreachable", "connect: refused"
		}), "staged", "loader_unreachable", "tried again at 2026-05-04T12:01:00Z: connect: refused", false},
		{"held by a tracer", underWayAt(wire.Staged, func(w *work) {
			w.After, w.Code, w.Text = now.Add(time.Minute), codeHeld, "kprobe on vmlinux:f: the kernel will refuse the livepatch"
		}), "held", "tracer_in_the_way", "tried again at 2026-05-04T12:01:00Z: kprobe on vmlinux:f", true},
		{"loading", underWayAt(wire.Loading, nil), "loading", "loading", "", false},
		{"transitioning", underWayAt(wire.Transitioning, nil), "transitioning", "transitioning", "since 10s", false},
		{"being taken back", underWayAt(wire.Transitioning, func(w *work) { w.Cancel = true }), "transitioning", "canceling", "", false},
		{"stalled", underWayAt(wire.Stalled, func(w *work) { w.Code, w.Text = "deadline", "task 7" }), "stalled", "deadline", "task 7", true},
		{"stalled by a kernel thread", underWayAt(wire.Stalled, func(w *work) {
			w.Code, w.Text = "kernel_thread", "kernel thread 10"
			w.Blocking = []Blocking{{TID: 10, Class: stall.KernelThread}}
		}), "stalled", "kernel_thread", "kernel thread 10", true},
		{"soaking", underWayAt(wire.Soaking, nil), "soaking", "soaking", "confirmed in 10m0s", false},
		{"soaked and not confirmed", underWayAt(wire.Soaking, func(w *work) { w.Code, w.Text = "not_done", "an object is not patched" }),
			"soaking", "not_done", "an object is not patched", false},
		{"put in by a loader that we cannot follow", func(in *inputs) { in.o.Loader.Highest = 2 }, "soaking", "not_confirmed", "", false},
		{"suspect", func(in *inputs) {
			in.j.Blocked = []blocked{{Phase: wire.Suspect, Kernel: in.o.Facts.Kernel.ID, Sequence: 3, Code: "kernel_trouble", Text: "kernel warning"}}
		}, "suspect", "kernel_trouble", "kernel warning", true},
		{"a suspect that was superseded", func(in *inputs) {
			in.j.Blocked = []blocked{{Phase: wire.Suspect, Kernel: in.o.Facts.Kernel.ID, Sequence: 2, Code: "kernel_trouble"}}
		}, "confirmed", "live_patched", "", false},
		{"failed", func(in *inputs) {
			in.j.Blocked = []blocked{{Phase: wire.Failed, Kernel: in.o.Facts.Kernel.ID, Sequence: 4, Code: "key_rejected", Text: "key not trusted"}}
		}, "failed", "key_rejected", "livepatch 4: key not trusted", true},
		{"the machine died with it", func(in *inputs) {
			in.j.Blocked = []blocked{{Phase: wire.Failed, Kernel: in.o.Facts.Kernel.ID, Sequence: 4, Code: "died", Text: "the machine died"}}
		}, "failed", "died", "", true},
		{"a failure of another kernel", func(in *inputs) {
			in.j.Blocked = []blocked{{Phase: wire.Failed, Kernel: kernel.BuildID{9}, Sequence: 4, Code: "key_rejected"}}
		}, "confirmed", "live_patched", "", false},
		{"not put back at boot", func(in *inputs) {
			bootOutcome("failed")(in)
			in.o.Loader.Boot.Code = "module_digest"
		}, "failed", "module_digest", "loading at boot", true},
		{"taken out by hand", func(in *inputs) { bootOutcome("loaded")(in); in.o.Loader.Disabled = true }, "disabled", "until_reboot", "", true},
		{"taken out while it soaked", func(in *inputs) {
			nothingLoaded(in)
			in.j.Blocked = []blocked{{Phase: wire.Failed, Kernel: in.o.Facts.Kernel.ID, Sequence: 3, BootID: "boot-1", Code: codeTakenOut, Text: "livepatch 3 was taken out"}}
		}, "disabled", "until_reboot", "taken out", true},
		{"booted with the parameter", bootOutcome("off_parameter"), "boot_stopped", "off_parameter", "klatch=off", true},
		{"the flag file was there at boot", bootOutcome("off_flag"), "boot_stopped", "off_flag", "/etc/klatch/off", true},
		{"the flag file is there on a new machine", func(in *inputs) {
			nothingLoaded(in)
			in.o.Loader.Boot.Stops = []string{"flag"}
		}, "boot_stopped", "off_flag", "", true},
		{"the breaker", bootOutcome("off_breaker"), "boot_stopped", "off_breaker", "died too often", true},
		{"something untrusted was shown", func(in *inputs) {
			in.j.Check.Result, in.j.Check.Code, in.j.Check.Kind, in.j.Check.Text = resultFailed, "metadata_expired", fault.Untrusted, "timestamp is expired"
		}, "check_failed", "metadata_expired", "timestamp is expired; the last good check was 1h0m0s ago", true},
		{"no server for a day", func(in *inputs) {
			in.j.Check.Result, in.j.Check.Code, in.j.Check.Kind, in.j.Check.GoodAt = resultFailed, "server_unavailable", fault.Unavailable, now.Add(-24*time.Hour)
		}, "check_failed", "server_unavailable", "24h0m0s ago", true},
		{"never a server", func(in *inputs) {
			in.j.Check = Check{At: now, Result: resultFailed, Code: "server_unavailable", Kind: fault.Unavailable}
		}, "check_failed", "server_unavailable", "no check has succeeded yet", true},
		{"the loader was never reached", func(in *inputs) {
			nothingLoaded(in)
			in.o.Loader, in.o.LoaderErr = nil, fault.New(fault.Unavailable, "loader_unreachable", "connect: no such file").WithHint("systemctl status klatch-loader.socket")
		}, "check_failed", "loader_unreachable", "connect: no such file", true},
		{"the kernel was declared dead", tells(notice.Support{Ended: "2026-05-01", Through: "6.1.0-52-cloud-amd64", Reason: "too many open CVEs", Instead: "6.1.0-56-cloud-amd64"}),
			"kernel_ended", "declared_dead", "kernel upgrade required: support of 6.1.0-50-cloud-amd64 ended: declared dead on 2026-05-01, with all kernels up to 6.1.0-52-cloud-amd64 (too many open CVEs)", true},
		{"support has ended", tells(notice.Support{Until: "2026-05-03"}), "kernel_ended", "support_ended", "ended on 2026-05-03", true},
		{"the last day of support", tells(notice.Support{Until: "2026-05-04"}), "confirmed", "live_patched", "", false},
		{"supported and a CVE cannot be livepatched", tells(notice.Support{Until: "2027-05-03"},
			notice.CVE{ID: "CVE-2026-0003", Code: "layout_changed", Text: "x", Advice: notice.Reboot}), "confirmed", "live_patched", "", false},
		{"a dead kernel and something untrusted was shown", func(in *inputs) {
			tells(notice.Support{Ended: "2026-05-01"})(in)
			in.j.Check.Result, in.j.Check.Code, in.j.Check.Kind = resultFailed, "metadata_rollback", fault.Untrusted
		}, "check_failed", "metadata_rollback", "", true},
		{"a dead kernel on its way to a newer livepatch", func(in *inputs) {
			tells(notice.Support{Ended: "2026-05-01"})(in)
			underWayAt(wire.Soaking, nil)(in)
		}, "soaking", "soaking", "", false},
		{"nothing published", func(in *inputs) { nothingLoaded(in); in.j.Check.Code = "no_livepatch" }, "no_livepatch", "no_livepatch", "", false},
		{"the kernel does not know the key", func(in *inputs) {
			nothingLoaded(in)
			in.o.KeyTrust = &bootkeys.Verdict{Word: bootkeys.Refused, Code: "module_key_missing", Text: "the key is not enrolled"}
		}, "key_untrusted", "module_key_missing", "not enrolled", true},
		{"the key is not enrolled any more and a livepatch is loaded", func(in *inputs) {
			in.o.KeyTrust = &bootkeys.Verdict{Word: bootkeys.Refused, Code: "module_key_missing"}
		}, "confirmed", "live_patched", "", false},
		{"signed, and filtered away by the server", func(in *inputs) {
			nothingLoaded(in)
			in.j.Check.Code, in.j.Check.Text = "no_livepatch", leftOut(wire.CheckAnswer{Absent: "filter"})
		}, "no_livepatch", "left_out", "leaves it out: its filter", false},
		{"a newer one waits on the server", func(in *inputs) {
			in.j.Check.Text = leftOut(wire.CheckAnswer{Absent: "age"})
		}, "confirmed", "live_patched", "newer: a livepatch is signed, but this machine's server leaves it out: it is younger", false},
		{"no check yet", func(in *inputs) { nothingLoaded(in); in.j.Check = Check{} }, "idle_current", "not_checked", "", false},
		{"nothing offered", func(in *inputs) { nothingLoaded(in) }, "idle_current", "current", "", false},
		{"its tier is not open", func(in *inputs) {
			nothingLoaded(in)
			in.j.Check.Code, in.j.Check.Text = "not_selected", "the operator wants nothing for this kernel build in tier fleet"
		}, "idle_current", "not_selected", "in tier fleet", false},
	}
}

func TestEveryStateIsReached(t *testing.T) {
	reached := map[string]bool{}
	for _, tt := range stateTable() {
		t.Run(tt.name, func(t *testing.T) {
			in := healthy()
			tt.change(&in)
			s := describe(in)
			if s.State != tt.word || s.Reason != tt.reason || !strings.Contains(s.Text, tt.text) || s.NextStep == "" || NeedsPerson(s) != tt.act {
				t.Errorf("state %+v, act %t; want %s/%s with %q, act %t", s, NeedsPerson(s), tt.word, tt.reason, tt.text, tt.act)
			}
			b, err := json.MarshalIndent(s, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, "testdata/state/"+strings.ReplaceAll(tt.name, " ", "-")+".json", append(b, '\n'))
		})
		reached[tt.word] = true
	}
	for _, m := range States {
		if !reached[m.Word] {
			t.Errorf("no story reaches %s", m.Word)
		}
	}
}

func TestAJournalOfAnotherKindIsNotGuessedAt(t *testing.T) {
	for name, content := range map[string]string{
		"not JSON":             "{",
		"another version":      `{"format":"klatch-journal/2","phase":"idle"}`,
		"an unknown phase":     `{"format":"klatch-journal/1","phase":"flying"}`,
		"a phase with no work": `{"format":"klatch-journal/1","phase":"soaking"}`,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, journalFile), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := openJournal(dir); fault.CodeOf(err) != "journal_malformed" || fault.HintOf(err) == "" {
				t.Errorf("err = %v", err)
			}
		})
	}
}

func FuzzOpenJournal(f *testing.F) {
	f.Add([]byte(`{"format":"klatch-journal/1","phase":"idle","work":null}`))
	f.Add([]byte(`{"format":"klatch-journal/1","phase":"soaking","work":{"sequence":3}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, journalFile), b, 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := openJournal(dir)
		if err == nil && j.Phase != wire.Idle && j.Work == nil {
			t.Errorf("phase %s without work", j.Phase)
		}
	})
}
