// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"regexp"
	"slices"
	"strings"
)

// TroubleKind sorts what a kernel complains about. The stored form is the
// string; it is never renamed.
type TroubleKind string

// The kinds of trouble.
const (
	Panic     TroubleKind = "panic"
	Oops      TroubleKind = "oops"       // the kernel stumbled: BUG, bad access, trap
	Warning   TroubleKind = "warning"    // WARN() and its like
	Lockdep   TroubleKind = "lockdep"    // locking rules broken
	Atomic    TroubleKind = "atomic"     // slept where that is forbidden
	Stall     TroubleKind = "stall"      // RCU stall, soft or hard lockup
	HungTask  TroubleKind = "hung_task"  // a task waits for too long
	Sanitizer TroubleKind = "sanitizer"  // KASAN, UBSAN, KCSAN, KMSAN, KFENCE, kmemleak
	Memory    TroubleKind = "memory"     // out of memory, failed allocations
	Livepatch TroubleKind = "livepatch"  // the livepatch core refuses or complains
	Module    TroubleKind = "module"     // the module loader refuses
	Storage   TroubleKind = "storage"    // file system or disk errors
	UserCrash TroubleKind = "user_crash" // a program was ended by a fault
)

// Trouble is one report of the kernel.
type Trouble struct {
	Kind TroubleKind `json:"kind"`
	// Line is the number of the first line, from 1.
	Line int `json:"line"`
	// Title is the first line without its time.
	Title string `json:"title"`
	// Report is the first line and what the kernel printed with it.
	Report string `json:"report"`
}

// maxReport bounds the lines of one report: the kernel's own are shorter.
const maxReport = 150

var (
	controls = regexp.MustCompile("\x1b\\[[0-9;?]*[A-Za-z]|\x1b[()][A-Za-z0-9]|\x1b[=>78c]|[\r\x00\x07]")

	// Every line that an expression takes holds one of its hints, which are
	// found a hundred times faster (FuzzClassify compares).
	rules = []struct {
		kind  TroubleKind
		hints []string
		re    *regexp.Regexp
	}{
		{Panic, []string{"Kernel panic"},
			regexp.MustCompile(`^Kernel panic - not syncing`)},
		{Sanitizer, []string{"BUG: K", "UBSAN: ", "kmemleak: "},
			regexp.MustCompile(`^(?:=+ )?(?:BUG: (?:KASAN|KCSAN|KMSAN|KFENCE)|UBSAN: |kmemleak: \d+ new suspected)`)},
		{Lockdep, []string{"WARNING: ", "INFO: ", "BUG: "},
			regexp.MustCompile(`^(?:=+ )?(?:WARNING: (?:possible|inconsistent|bad unlock|suspicious RCU|Nested lock|held lock|lock held)|INFO: (?:possible|inconsistent|trying to register non-static key|suspicious RCU)|\[ ?BUG: |BUG: (?:held lock|bad unlock|MAX_LOCK))`)},
		{Stall, []string{"INFO: rcu_", "kthread starved", "BUG: soft lockup", "BUG: workqueue lockup", "LOCKUP"},
			regexp.MustCompile(`^(?:rcu: )?INFO: rcu_\w+ (?:self-)?detected|^rcu: rcu_\w+ kthread starved|^(?:watchdog: )?BUG: (?:soft lockup|workqueue lockup)|^(?:NMI watchdog: )?Watchdog detected hard LOCKUP|^watchdog: CPU\d+: Watchdog detected hard LOCKUP`)},
		{HungTask, []string{"INFO: task "},
			regexp.MustCompile(`^INFO: task .* blocked for more than`)},
		{Atomic, []string{"BUG: ", "DEBUG_LOCKS", "huh, entered", "bad: scheduling"},
			regexp.MustCompile(`^BUG: (?:scheduling while atomic|sleeping function called|using .* in preemptible|workqueue leaked|assuming (?:atomic|non))|^DEBUG_LOCKS_WARN_ON|^(?:softirq: )?huh, entered softirq|^bad: scheduling from the idle thread`)},
		{Oops, []string{"BUG", "Oops", "Internal error: ", "Unable to handle", "kernel tried", "PANIC", "protection fault", "int3: ", "double fault", "segment: ", "opcode: ", "divide error", "bounds: ", "alignment check", "TSS: ", "Bad page", "corruption", "usercopy: ", "stack overflow", "buffer overflow", "control protection"},
			regexp.MustCompile(`^(?:BUG: |BUG \S+ \(.*\): |kernel BUG at|Oops[: ]|Internal error: |Unable to handle kernel|kernel tried to execute|traps: PANIC|general protection fault(?:,|:)|int3: |double fault|stack segment: |invalid opcode: |divide error: |bounds: |alignment check: |invalid TSS: |Bad page (?:state|map)|(?:list_add|list_del) corruption|usercopy: Kernel memory|kernel stack overflow|detected buffer overflow|control protection)`)},
		{Warning, []string{"WARNING: ", "unchecked MSR", "refcount_t: ", "nobody cared", "lost some interrupts", "duplicate filename", "seriously wrong", "unregister_netdevice", "Busy inodes", "Attempt to release", "cut here"},
			regexp.MustCompile(`^(?:WARNING: (?:CPU: |at |kernel |stack |can't |unrecognized |\S+:\d+ at )|unchecked MSR access|refcount_t: |irq \d+: nobody cared|rtc.*lost some interrupts|(?:sysfs: )?cannot create duplicate filename|kobject.*something is seriously wrong|unregister_netdevice: waiting for|VFS: Busy inodes after unmount|IPv4: Attempt to release|------------\[ cut here \]------------$)`)},
		{Memory, []string{"ut of memory: ", "oom-killer", "allocation failure", "Unable to allocate", "vmap allocation"},
			regexp.MustCompile(`^(?:Out of memory: |Memory cgroup out of memory: |.* invoked oom-killer: |.*: page allocation failure: |SLUB: Unable to allocate|.*vmap allocation for size \d+ failed)`)},
		{Module, []string{"disagrees about", "Unknown symbol", "no symbol version", "exports duplicate", "version magic", "module: ", "Invalid ELF", "Loading of", "Unknown rela", "overflow", "relocation"},
			regexp.MustCompile(`^(?:.*: disagrees about version of symbol|[\w-]+: Unknown symbol |[\w-]+: (?:no symbol version for|exports duplicate symbol|version magic .* should be)|module: .*: .*(?:overlap|invalid|overflow)|Invalid ELF |Loading of (?:module|unsigned module)|[\w-]+: (?:Unknown rela|overflow in relocation)|module [\w-]+: .*(?:relocation|overflow))`)},
		{Storage, []string{"EXT4-fs", "I/O error", "blk_update_request", "JBD2", "Aborting journal"},
			regexp.MustCompile(`^(?:EXT4-fs error|EXT4-fs \(.*\): (?:error|Remounting filesystem read-only)|Buffer I/O error|I/O error, dev|blk_update_request: .*error|JBD2: .*error|Aborting journal)`)},
		{UserCrash, []string{"segfault at", "protection fault", "trap "},
			regexp.MustCompile(`^(?:traps: )?\S+\[\d+\]:? (?:segfault at|general protection fault|trap (?:invalid opcode|int3|divide error|stack segment))`)},
	}

	// What the livepatch core says when all is well; everything else it says
	// is trouble (kernel/livepatch/{core,patch,transition}.c, 6.1 to 7.3).
	livepatchFine = regexp.MustCompile(`^livepatch: (?:` +
		`enabling patch '|` +
		`'[^']*': (?:initializing|starting|completing|reversing) (?:un)?patching transition|` +
		`'[^']*': (?:un)?patching complete|` +
		`'[^']*': canceling patching transition, going to unpatch|` +
		`applying patch '[^']*' to loading module|` +
		`reverting patch '[^']*' on unloading module|` +
		`reverting the patch on |` +
		`signaling remaining tasks|` +
		`tainting kernel with TAINT_LIVEPATCH)`)

	// Lines that match a rule and are nothing to worry about.
	fine = regexp.MustCompile(`^(?:rcu_sched: |BUG: unable to handle .* \(test\))`)

	endOfReport = regexp.MustCompile(`^---\[ end (?:trace|Kernel panic)|^</TASK>$`)
	// A stack that nothing announced is of a complaint that we do not know yet.
	stackLine    = "Call Trace:"
	cutHere      = regexp.MustCompile(`^------------\[ cut here \]------------$`)
	stillTrouble = map[TroubleKind]bool{Oops: true, Warning: true, Atomic: true, Sanitizer: true, Stall: true}
)

// CleanConsole takes terminal control sequences and carriage returns out of
// what came over a serial line. Bytes that are no UTF-8 are replaced.
func CleanConsole(raw []byte) string {
	return controls.ReplaceAllString(strings.ToValidUTF8(string(raw), "\uFFFD"), "")
}

// ScanConsole finds every report of trouble in a kernel's log. Only lines of
// the kernel itself count, whatever programs write to the console.
//
// Lines that come with a livepatch on a healthy machine are no trouble: the
// taint messages, enabling, transition, cancel.
func ScanConsole(log string) []Trouble {
	var found []Trouble
	open := -1 // index of the report that still goes on
	lines := 0 // lines in it
	report := &strings.Builder{}
	finish := func() {
		if open >= 0 {
			found[open].Report = report.String()
		}
		open = -1
		report.Reset()
	}
	n := 0
	for line := range strings.Lines(log) {
		n++
		text, ok := said(strings.TrimRight(line, "\n"))
		if !ok {
			continue
		}
		kind := classify(text)
		if kind == "" && open < 0 && text == stackLine {
			kind = Warning
		}
		if kind != "" && continues(found, open, kind) {
			// The same report says more: Oops after BUG, the WARNING line
			// after "cut here", which makes the better title.
			if cutHere.MatchString(found[open].Title) {
				found[open].Kind, found[open].Title = kind, text
			}
			kind = ""
		}
		if kind != "" {
			finish()
			found = append(found, Trouble{Kind: kind, Line: n, Title: text})
			open, lines = len(found)-1, 0
		}
		if open < 0 {
			continue
		}
		report.WriteString(text + "\n")
		if lines++; lines >= maxReport || endOfReport.MatchString(strings.TrimSpace(text)) || singleLine(found[open].Kind) {
			finish()
		}
	}
	finish()
	return found
}

// said is what the kernel says in a line. It begins with its time; before that
// there may be a level in angle brackets, on early consoles, and after it who
// spoke (CONFIG_PRINTK_CALLER). Lines without are from programs that write to
// the console. But the kernel does not wait for a program to end its line: its
// time may stand behind a prompt, or behind bytes that a serial line made up.
func said(line string) (text string, ok bool) {
	for from := 0; ; {
		i := strings.IndexByte(line[from:], '[')
		if i < 0 {
			return "", false
		}
		from += i + 1
		if rest, ok := afterTime(line[from:]); ok {
			return strings.TrimRight(strings.TrimPrefix(rest, " "), " "), true
		}
	}
}

// afterTime reads "   12.345678]" and perhaps "[  T123]" behind it.
func afterTime(s string) (rest string, ok bool) {
	s = strings.TrimLeft(s, " ")
	n := digits(s)
	if n == 0 || !strings.HasPrefix(s[n:], ".") || digits(s[n+1:]) != 6 || !strings.HasPrefix(s[n+7:], "]") {
		return "", false
	}
	s = s[n+8:]
	caller, found := strings.CutPrefix(s, "[")
	if !found {
		return s, true
	}
	caller = strings.TrimLeft(caller, " ")
	if !strings.HasPrefix(caller, "T") && !strings.HasPrefix(caller, "C") {
		return s, true
	}
	if n := digits(caller[1:]); n > 0 && strings.HasPrefix(caller[1+n:], "]") {
		return caller[n+2:], true
	}
	return s, true
}

// digits counts those that s begins with.
func digits(s string) int {
	n := 0
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	return n
}

// classify gives the kind of one kernel line, or nothing.
func classify(text string) TroubleKind {
	if fine.MatchString(text) {
		return ""
	}
	if strings.HasPrefix(text, "livepatch: ") {
		if livepatchFine.MatchString(text) {
			return ""
		}
		return Livepatch
	}
	for _, r := range rules {
		if holdsOne(text, r.hints) && r.re.MatchString(text) {
			return r.kind
		}
	}
	return ""
}

func holdsOne(text string, hints []string) bool {
	return slices.ContainsFunc(hints, func(h string) bool { return strings.Contains(text, h) })
}

// continues says whether a line of this kind belongs to the open report. A
// panic is always news: it says that the machine is gone.
func continues(found []Trouble, open int, kind TroubleKind) bool {
	return open >= 0 && stillTrouble[found[open].Kind] && stillTrouble[kind]
}

// singleLine kinds print one line each, no trace.
func singleLine(k TroubleKind) bool {
	return k == Livepatch || k == Module || k == Storage || k == UserCrash
}
