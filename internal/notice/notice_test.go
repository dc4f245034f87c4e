// SPDX-License-Identifier: Apache-2.0

package notice

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/kernel"
)

var build = kernel.Build{Distro: "debian-12", Arch: kernel.AMD64, Release: "6.1.0-50-cloud-amd64", ID: kernel.BuildID{0xca, 0xfe}}

func sample() Notice {
	return Notice{
		Format: Format, Kernel: build,
		Support: Support{Until: "2027-06-30", Ended: "2026-11-25", Through: "6.1.0-52-cloud-amd64", Reason: "six hundred <open> CVEs", Instead: "6.1.0-54-cloud-amd64"},
		CVEs: []CVE{
			{"CVE-2026-0001", "layout_changed", "struct sock grows", Reboot},
			{"CVE-2026-0002", Deferred, "nobody can reach it here", Wait},
			{"CVE-2026-10001", Decided, "wait for the next kernel", Reboot},
		},
	}
}

func TestANoticeComesBackAsItWas(t *testing.T) {
	b, err := sample().Encode()
	if err != nil {
		t.Fatal(err)
	}
	n, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if len(n.Reboots()) != 2 || n.Support != sample().Support || n.Empty() || n.Fits(build) != nil {
		t.Errorf("%+v", n)
	}
	if p := TargetPath(build); p != "notices/1/amd64/"+build.ID.String()+".json" {
		t.Errorf("path %s", p)
	}
}

func TestANoticeIsOnOneKernelBuild(t *testing.T) {
	for name, change := range map[string]func(*kernel.Build){
		"the neighbor build": func(k *kernel.Build) { k.ID[0] ^= 1 },
		"another release":    func(k *kernel.Build) { k.Release = "6.1.0-51-cloud-amd64" },
		"an unknown kernel":  func(k *kernel.Build) { *k = kernel.Build{} },
	} {
		k := build
		change(&k)
		if err := sample().Fits(k); fault.CodeOf(err) != "wrong_build" || fault.KindOf(err) != fault.Untrusted {
			t.Errorf("%s: %v", name, err)
		}
	}
	k := build
	k.Distro = "own" // the machine reads its distribution from a file, the publisher from a package
	if err := sample().Fits(k); err != nil {
		t.Errorf("the same build under another distribution's name: %v", err)
	}
}

func TestWhatIsNoNoticeIsRefused(t *testing.T) {
	good, err := sample().Encode()
	if err != nil {
		t.Fatal(err)
	}
	text := func(old, fresh string) []byte {
		if !bytes.Contains(good, []byte(old)) {
			t.Fatalf("no %q", old)
		}
		return bytes.Replace(good, []byte(old), []byte(fresh), 1)
	}
	many := sample()
	many.CVEs = nil
	for i := range MaxCVEs + 1 {
		many.CVEs = append(many.CVEs, CVE{cve.ID(fmt.Sprintf("CVE-2026-%d", 100000+i)), Decided, "x", Reboot})
	}
	if _, err := many.Encode(); fault.CodeOf(err) != "notice_malformed" {
		t.Errorf("too many CVEs: %v", err)
	}
	for name, b := range map[string][]byte{
		"empty":                 nil,
		"another version":       text("klatch-notice/1", "klatch-notice/2"),
		"an unknown member":     text(`"cves"`, `"more": 1, "cves"`),
		"a member twice":        text(`"until"`, `"until": "2027-01-01", "until"`),
		"trailing bytes":        append(bytes.Clone(good), '\n'),
		"cut off":               good[:len(good)-3],
		"no build id":           text(build.ID.String(), strings.Repeat("0", 40)),
		"a day that is none":    text("2027-06-30", "2027-06-31"),
		"a release that is bad": text("6.1.0-54-cloud-amd64", "../../etc"),
		"two in wrong order":    text("CVE-2026-0002", "CVE-2026-0001"),
		"a code that is bad":    text("layout_changed", "Layout!"),
		"an unknown advice":     text("update_and_reboot", "shut_down"),
		"a text of two lines":   text("struct sock grows", `struct\nsock grows`),
		"no text":               text("struct sock grows", ""),
		"too long a text":       text("struct sock grows", strings.Repeat("x", MaxText+1)),
		"too large":             append(bytes.Clone(good), bytes.Repeat([]byte(" "), MaxBytes)...),
		"dead with no day":      text(` "ended": "2026-11-25",`, ""),
		"null for the list":     []byte(`{"format":"klatch-notice/1","cves":null}`),
		"html left as it is":    text(`\u003copen\u003e`, "<open>"),
	} {
		if n, err := Parse(b); fault.CodeOf(err) != "notice_malformed" || fault.KindOf(err) != fault.Untrusted || !n.Empty() {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestStatesOfSupport(t *testing.T) {
	for _, c := range []struct {
		name  string
		s     Support
		now   string
		state State
		text  string
	}{
		{"nobody said", Support{}, "2026-11-25T12:00:00Z", Unknown, "unknown: the publisher names no end"},
		{"a year left", Support{Until: "2027-11-25"}, "2026-11-25T12:00:00Z", Supported, "supported until 2027-11-25, 365 days left"},
		{"sixty days and an hour left", Support{Until: "2027-01-23"}, "2026-11-24T23:00:00Z", Supported, "supported until 2027-01-23, 60 days left"},
		{"sixty days left", Support{Until: "2027-01-23"}, "2026-11-25T00:00:00Z", Ending, "ending: supported only until 2027-01-23, 60 days left"},
		{"one day left", Support{Until: "2026-11-26"}, "2026-11-25T23:00:00Z", Ending, "ending: supported only until 2026-11-26, 1 day left"},
		{"the last day", Support{Until: "2026-11-25"}, "2026-11-25T23:59:59Z", Ending, "ending: supported only until 2026-11-25, its last day"},
		{"the day after", Support{Until: "2026-11-25"}, "2026-11-26T00:00:00Z", Ended, "ended on 2026-11-25"},
		{"declared dead, whatever was promised", Support{Until: "2030-01-01", Ended: "2026-11-01", Reason: "why"}, "2026-11-02T00:00:00Z", Ended,
			"ended: declared dead on 2026-11-01 (why)"},
		{"with older ones", Support{Ended: "2026-11-01", Through: "6.1.0-52-amd64"}, "2026-11-02T00:00:00Z", Ended,
			"ended: declared dead on 2026-11-01, with all kernels up to 6.1.0-52-amd64"},
	} {
		t.Run(c.name, func(t *testing.T) {
			now, err := time.Parse(time.RFC3339, c.now)
			if err != nil {
				t.Fatal(err)
			}
			if state, _, err := c.s.At(now); err != nil || state != c.state || c.s.Text(now) != c.text {
				t.Errorf("%s, %q, %v; want %s, %q", state, c.s.Text(now), err, c.state, c.text)
			}
		})
	}
}

func TestOneLineOfAnyText(t *testing.T) {
	for in, want := range map[string]string{
		"as it is":         "as it is",
		" two\nlines\t\r":  "two lines",
		"bad \xff byte":    "bad byte",
		"\x1b[2Jcleared":   "[2Jcleared",
		"":                 "",
		"\ufffd replaced ": "replaced",
	} {
		if got := OneLine(in); got != want || !Line(got) {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
	}
	for _, long := range []string{strings.Repeat("x", 9000), strings.Repeat("…", 9000), strings.Repeat("\xff", 9000)} {
		if got := OneLine(long); !Line(got) {
			t.Errorf("%.20q becomes %d bytes", long, len(got))
		}
	}
}

// What parses is the one form: encoding gives the same bytes again.
func FuzzParse(f *testing.F) {
	good, err := sample().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(bytes.Replace(good, []byte(`"until"`), []byte(`"until": "2027-01-01", "until"`), 1))
	f.Add(append(bytes.Clone(good), ' '))
	f.Add([]byte(`{"format":"klatch-notice/1"}`))
	empty, err := Notice{Format: Format, Kernel: build}.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(empty)
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := Parse(b)
		if err != nil {
			return
		}
		if again, err := n.Encode(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%q comes back as %q, %v", b, again, err)
		}
		if _, _, err := n.Support.At(time.Unix(0, 0)); err != nil {
			t.Errorf("support of a notice that parses: %v", err)
		}
	})
}
