// SPDX-License-Identifier: Apache-2.0

// Package changelog reads the changelog of Debian's linux source package: one
// stanza per upload (deb-changelog(5)), in which the maintainers list the
// changes of each stable update with the CVEs that they fix. CVE ids are added
// to old stanzas afterwards, so a newer changelog knows more of an old upload
// than the changelog of that upload did.
//
// Start with Parse, then Between.
package changelog

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"

	debversion "github.com/knqyf263/go-deb-version"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
)

// Upload is one version of the source package.
type Upload struct {
	Source  string
	Version string
	Suites  string
	Date    string // as the trailer has it; may be empty
	Changes []Change
}

// Change is one item of an upload.
type Change struct {
	Subject string   // the commit's subject where it is one, without tags, CVEs and bug numbers
	Tags    []string // what stood in brackets before it, such as x86 or rt: only for those
	CVEs    []cve.ID
	Stable  string // the stable release whose update it came with; empty for Debian's own
	Group   string // subject of the item that it belongs to, where that is not a stable update
	Version string // of the upload
}

// Limits of what is read: Debian's has 3.5 MB and 62,000 lines.
const (
	maxBytes   = 64 << 20
	maxLine    = 64 << 10
	maxSubject = 4096
	maxUploads = 20_000
)

// Parse reads a changelog, plain or compressed with gzip. Debian's order is
// newest first.
func Parse(r io.Reader, name string) ([]Upload, error) {
	br := bufio.NewReader(r)
	var plain io.Reader = br
	if magic, err := br.Peek(2); err == nil && magic[0] == 0x1f && magic[1] == 0x8b {
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, bad(name, "uncompress: %w", err)
		}
		plain = z
	}
	b, err := durable.ReadLimited(plain, name, maxBytes)
	if err != nil {
		return nil, bad(name, "%w", err)
	}
	p := parser{}
	sc := bufio.NewScanner(bytes.NewReader(b))
	sc.Buffer(make([]byte, 0, 4096), maxLine)
	for n := 1; sc.Scan(); n++ {
		if err := p.line(strings.TrimRight(sc.Text(), " \t\r")); err != nil {
			return nil, bad(name, "line %d: %w", n, err)
		}
	}
	if err := sc.Err(); err != nil {
		return nil, bad(name, "%w", err)
	}
	p.endItem()
	if len(p.uploads) == 0 {
		return nil, bad(name, "it has no upload")
	}
	return p.uploads, nil
}

func bad(name, format string, args ...any) error {
	return fault.New(fault.Invalid, "bad_changelog", "read changelog %s: %w", name, fmt.Errorf(format, args...)).
		WithHint("take changelog.Debian.gz from a package of the linux source package")
}

var (
	header = regexp.MustCompile(`^([a-z0-9][a-z0-9+.-]*) \(([^() ]+)\)((?: [-+0-9a-zA-Z.]+)+);`)
	marker = regexp.MustCompile(`^( +)([*+-]) +(.*)$`)
	stable = regexp.MustCompile(`ChangeLog-([0-9.]+[0-9])`)
	naming = regexp.MustCompile(`\bCVE-[0-9]{4}-[0-9]{4,19}\b`)
	tag    = regexp.MustCompile(`^\[([^\]]{1,80})\] *`)
	// aside is what Debian writes behind a subject.
	aside = regexp.MustCompile(`(?i) *\((?:(?:CVE-[0-9]{4}-[0-9]+|closes:|#[0-9]+|re:)[\s,;]*)+\)`)
)

// item is one that is open, from its marker to the next one.
type item struct {
	indent int
	text   []byte
	group  string
	cves   []cve.ID // inherited by its parts
}

type parser struct {
	uploads []Upload
	open    []item // from the outermost to the innermost
	stable  string
	ended   bool // the innermost item is complete
}

func (p *parser) line(s string) error {
	if m := header.FindStringSubmatch(s); m != nil {
		p.endItem()
		if len(p.uploads) >= maxUploads {
			return errors.New("too many uploads")
		}
		if _, err := debversion.NewVersion(m[2]); err != nil {
			return fmt.Errorf("version %.80q: %w", m[2], err)
		}
		p.uploads = append(p.uploads, Upload{Source: m[1], Version: m[2], Suites: strings.TrimSpace(m[3])})
		p.open, p.stable = nil, ""
		return nil
	}
	if len(p.uploads) == 0 {
		if s == "" {
			return nil
		}
		return fmt.Errorf("%.60q comes before the first upload", s)
	}
	trimmed := strings.TrimLeft(s, " \t")
	switch {
	case s == "" || strings.HasPrefix(s, "  [ ") && strings.HasSuffix(s, " ]"):
		p.endItem()
	case strings.HasPrefix(s, " -- "):
		p.endItem()
		p.open, p.stable = nil, ""
		if _, date, ok := strings.Cut(s, ">  "); ok {
			p.uploads[len(p.uploads)-1].Date = date
		}
	case marker.MatchString(s):
		m := marker.FindStringSubmatch(s)
		p.begin(len(m[1]), m[3])
	case strings.HasPrefix(trimmed, "https://") || strings.HasPrefix(trimmed, "http://"):
		p.link(trimmed)
	default:
		p.more(trimmed)
	}
	return nil
}

// begin opens an item that is a part of those with a smaller indent.
func (p *parser) begin(indent int, text string) {
	p.endItem()
	p.open = slices.DeleteFunc(p.open, func(i item) bool { return i.indent >= indent })
	if len(p.open) == 0 {
		p.stable = ""
	}
	var group string
	var inherited []cve.ID
	if n := len(p.open); n > 0 {
		up := p.open[n-1]
		if p.stable == "" || n > 1 {
			group = up.group
		}
		inherited = up.cves
	}
	p.open = append(p.open, item{indent: indent, text: []byte(text), group: group, cves: inherited})
	p.ended = false
}

// link is where the list of a stable update begins; one item may hold several.
func (p *parser) link(url string) {
	m := stable.FindStringSubmatch(url)
	if m == nil || len(p.open) == 0 {
		p.more(url)
		return
	}
	p.endItem()
	p.open, p.stable = p.open[:1], m[1]
	p.open[0].cves = nil
}

func (p *parser) more(text string) {
	if n := len(p.open); n > 0 && !p.ended && len(p.open[n-1].text) < maxSubject {
		p.open[n-1].text = append(append(p.open[n-1].text, ' '), text...)
	}
}

// endItem makes a Change of the innermost item.
func (p *parser) endItem() {
	n := len(p.open)
	if n == 0 || p.ended {
		return
	}
	p.ended = true
	it := &p.open[n-1]
	u := &p.uploads[len(p.uploads)-1]
	c := read(string(it.text))
	c.Version, c.Group = u.Version, it.group
	if n > 1 {
		c.Stable = p.stable
	}
	if strings.HasSuffix(string(it.text), ":") { // what follows are its parts
		it.group, it.cves = c.Subject, append(slices.Clone(it.cves), c.CVEs...)
	} else {
		it.group = c.Subject
		for _, id := range it.cves {
			if !slices.Contains(c.CVEs, id) {
				c.CVEs = append(c.CVEs, id)
			}
		}
		it.cves = nil
	}
	u.Changes = append(u.Changes, c)
}

// read takes an item's text apart.
func read(text string) Change {
	var c Change
	for _, s := range naming.FindAllString(text, -1) {
		if id := cve.ID(s); !slices.Contains(c.CVEs, id) {
			c.CVEs = append(c.CVEs, id)
		}
	}
	text = aside.ReplaceAllString(text, "")
	for {
		m := tag.FindStringSubmatch(text)
		if m == nil {
			break
		}
		c.Tags = append(c.Tags, strings.FieldsFunc(m[1], func(r rune) bool { return r == ',' || r == ' ' })...)
		text = text[len(m[0]):]
	}
	c.Subject = strings.TrimSpace(text)
	return c
}

// Compare orders versions of Debian packages (deb-version(7)).
func Compare(a, b string) (int, error) {
	va, err := debversion.NewVersion(a)
	if err != nil {
		return 0, fault.New(fault.Invalid, "bad_version", "package version %.80q: %w", a, err)
	}
	vb, err := debversion.NewVersion(b)
	if err != nil {
		return 0, fault.New(fault.Invalid, "bad_version", "package version %.80q: %w", b, err)
	}
	return va.Compare(vb), nil
}

// Between returns the uploads after from, up to and with to. Both must be in
// the changelog: one that is older than to would leave changes out silently.
func Between(uploads []Upload, from, to string) ([]Upload, error) {
	if c, err := Compare(from, to); err != nil {
		return nil, err
	} else if c >= 0 {
		return nil, fault.New(fault.Invalid, "not_newer", "version %s is not newer than %s", to, from).
			WithHint("name the version that the kernel has first, then the newer one")
	}
	for _, v := range []string{from, to} {
		if !slices.ContainsFunc(uploads, func(u Upload) bool { return u.Version == v }) {
			return nil, fault.New(fault.NotFound, "no_upload", "the changelog has no version %s; its newest is %s", v, newest(uploads)).
				WithHint("take the changelog of version %s or of a newer one", to)
		}
	}
	var in []Upload
	for _, u := range uploads {
		a, err := Compare(u.Version, from)
		if err != nil {
			return nil, err
		}
		b, err := Compare(u.Version, to)
		if err != nil {
			return nil, err
		}
		if a > 0 && b <= 0 {
			in = append(in, u)
		}
	}
	return in, nil
}

func newest(uploads []Upload) string {
	if len(uploads) == 0 {
		return "none"
	}
	return uploads[0].Version
}
