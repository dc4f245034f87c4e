// SPDX-License-Identifier: Apache-2.0

// Package notice is what a publisher tells the machines of one kernel build
// beside livepatches: how long livepatches are made for it, whether it was
// declared dead, and which CVEs no livepatch will fix there. It is plain data.
//
// A notice is a target of the TUF repository and signed as such; it loads
// nothing. Where there is none, nothing is known: never read that as "fine".
//
// Start with Notice and Parse.
package notice

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/kernel"
)

// Format is the version word. Another version lies at another path, so a
// machine that knows only this one keeps reading what it understands.
const Format = "klatch-notice/1"

// Limits of foreign bytes. 14,600 CVEs of the kernel were known in mid-2026, of
// which a policy asks for a few hundred on one kernel build.
const (
	MaxBytes = 2 << 20
	MaxCVEs  = 5000
	MaxText  = 300 // of a reason, in bytes
)

// Notice is what is said of one kernel build.
type Notice struct {
	Format  string       `json:"format"`
	Kernel  kernel.Build `json:"kernel"`
	Support Support      `json:"support"`
	CVEs    []CVE        `json:"cves"` // that no livepatch fixes on this build; by number
}

// CVE is one that no livepatch fixes on a kernel build.
type CVE struct {
	ID     cve.ID     `json:"cve"`
	Code   fault.Code `json:"code"` // of the refusal, or decided or deferred by a person
	Text   string     `json:"text"` // why, in one line
	Advice Advice     `json:"advice"`
}

// Advice is what whoever runs the kernel build can do about a CVE.
type Advice string

// The advices. Their spelling is stored and sent.
const (
	Reboot Advice = "update_and_reboot"
	Wait   Advice = "wait" // a person decided: not now
)

// The codes of what a person decided; all others are refusals of the builder.
const (
	Decided  fault.Code = "decided"
	Deferred fault.Code = "deferred"
)

// TargetPath is where the notice on a kernel build lies in the TUF repository.
// The build id alone decides, as it does for a livepatch.
func TargetPath(k kernel.Build) string {
	return fmt.Sprintf("notices/1/%s/%s.json", k.Arch, k.ID)
}

// Reboots lists the CVEs that only an update and a reboot fix.
func (n Notice) Reboots() []CVE {
	var all []CVE
	for _, c := range n.CVEs {
		if c.Advice == Reboot {
			all = append(all, c)
		}
	}
	return all
}

// Empty says that nothing is said.
func (n Notice) Empty() bool { return n.Support == Support{} && len(n.CVEs) == 0 }

// Fits says why a notice does not speak of the kernel that runs.
func (n Notice) Fits(running kernel.Build) error {
	if n.Kernel.ID != running.ID || n.Kernel.Release != running.Release || n.Kernel.Arch != running.Arch {
		return fault.New(fault.Untrusted, "wrong_build", "notice is on kernel %s, the running kernel is %s", n.Kernel, running).
			WithHint("tell the publisher: a notice lies at the wrong place")
	}
	return nil
}

// Encode writes the one form of a notice: JSON with one-space indent, fields in
// the order of the type, a newline at the end.
func (n Notice) Encode() ([]byte, error) {
	if n.CVEs == nil {
		n.CVEs = []CVE{}
	}
	if err := n.validate(); err != nil {
		return nil, fault.New(fault.Invalid, "notice_malformed", "notice on %s: %w", n.Kernel, err)
	}
	b, err := json.MarshalIndent(n, "", " ")
	if err != nil {
		return nil, fmt.Errorf("encode notice: %w", err)
	}
	if len(b) >= MaxBytes {
		return nil, fault.New(fault.Invalid, "notice_malformed", "notice on %s: %d bytes, limit %d", n.Kernel, len(b), MaxBytes)
	}
	return append(b, '\n'), nil
}

// Parse reads what Encode wrote, and nothing else: unknown or repeated fields,
// other spellings of the same value and trailing bytes are refused.
func Parse(b []byte) (Notice, error) {
	var n Notice
	bad := func(format string, args ...any) (Notice, error) {
		return Notice{}, fault.New(fault.Untrusted, "notice_malformed", "read notice: "+format, args...)
	}
	if len(b) > MaxBytes {
		return bad("%d bytes, limit %d", len(b), MaxBytes)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&n); err != nil {
		return bad("%w", err)
	}
	again, err := n.Encode()
	if err != nil {
		return bad("%w", err)
	}
	if !bytes.Equal(again, b) {
		return bad("it is not in its canonical form")
	}
	return n, nil
}

var codePattern = regexp.MustCompile(`^[a-z][a-z0-9_]{0,63}$`)

func (n Notice) validate() error {
	k := n.Kernel
	switch {
	case n.Format != Format:
		return fmt.Errorf("format %.40q, want %q", n.Format, Format)
	case k.ID.IsZero() || k.Release == "" || k.Arch == "" || k.Distro == "":
		return fmt.Errorf("kernel is incomplete")
	case len(n.CVEs) > MaxCVEs:
		return fmt.Errorf("%d CVEs, limit %d", len(n.CVEs), MaxCVEs)
	}
	if err := n.Support.validate(); err != nil {
		return err
	}
	for i, c := range n.CVEs {
		if _, err := cve.Parse(string(c.ID)); err != nil {
			return err
		}
		switch {
		case i > 0 && cve.Compare(n.CVEs[i-1].ID, c.ID) >= 0:
			return fmt.Errorf("%s is listed twice, or not in order", c.ID)
		case !codePattern.MatchString(string(c.Code)):
			return fmt.Errorf("%s: code %.80q", c.ID, c.Code)
		case c.Text == "" || !Line(c.Text):
			return fmt.Errorf("%s: text is not one line of at most %d bytes", c.ID, MaxText)
		case c.Advice != Reboot && c.Advice != Wait:
			return fmt.Errorf("%s: advice %.40q", c.ID, c.Advice)
		}
	}
	return nil
}

func (s Support) validate() error {
	for _, d := range []string{s.Until, s.Ended} {
		if _, err := time.Parse(time.DateOnly, d); d != "" && err != nil {
			return badDate(d)
		}
	}
	for _, r := range []kernel.Release{s.Through, s.Instead} {
		if _, err := kernel.ParseRelease(string(r)); r != "" && err != nil {
			return err
		}
	}
	if !Line(s.Reason) {
		return fmt.Errorf("reason is not one line of at most %d bytes", MaxText)
	}
	if s.Ended == "" && s.Through != "" {
		return fmt.Errorf("kernels up to %s ended, and nobody says when", s.Through)
	}
	return nil
}

// Line says whether a text fits into one line of a notice.
func Line(s string) bool {
	return len(s) <= MaxText && utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return unicode.IsControl(r) || r == utf8.RuneError })
}

// OneLine makes such a line of any text.
func OneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == utf8.RuneError {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, " "))
	s = strings.Join(strings.Fields(s), " ")
	const more = " …"
	if len(s) > MaxText {
		s = strings.ToValidUTF8(s[:MaxText-len(more)], "") + more
	}
	return s
}
