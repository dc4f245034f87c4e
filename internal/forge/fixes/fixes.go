// SPDX-License-Identifier: Apache-2.0

// Package fixes joins what Debian's changelog says of the uploads between two
// versions of the linux source package with what the kernel CNA says of the
// upstream versions they are made of: which CVEs are fixed on the way, by
// which changes, in which files, and who says so. It decides nothing about
// what is worth a livepatch.
//
// Start with Between.
package fixes

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/changelog"
)

// Knowledge says who knows that a CVE is fixed between the versions.
type Knowledge string

// The words. Their spelling is stored.
const (
	ByChangelog Knowledge = "changelog"
	ByCNA       Knowledge = "cna"
	ByBoth      Knowledge = "both"
)

// Fix is one CVE that changelog or CNA say is fixed between the versions.
type Fix struct {
	CVE     cve.ID    `json:"cve"`
	KnownBy Knowledge `json:"known_by"`
	// Title is the CNA's, which is the mainline commit's subject, else that of
	// the first change.
	Title string `json:"title"`
	// Changes are those of the changelog that name the CVE, or else the one
	// whose subject is the CNA's title. They may be none.
	Changes []changelog.Change `json:"changes,omitempty"`
	// Upload is the first one after from that has the fix: the one whose
	// changelog names it, else the first with the upstream version.
	Upload string `json:"upload"`
	// UpstreamUpload is the first one that is made of FixedIn or later.
	UpstreamUpload string `json:"upstream_upload,omitempty"`
	// Files are what the fix touches in mainline; a backport may differ. None
	// means that nobody knows: no_data.
	Files []string `json:"files"`
	// FixedIn is the point release of this stable line, and Commit the commit
	// there; both empty when the CNA has none.
	FixedIn string `json:"fixed_in,omitempty"`
	Commit  string `json:"commit,omitempty"`
	// Status is what holds for the version that is left behind: affected, or
	// not_affected with a reason when the flaw is not in it, or fixed when it
	// had the fix before. Unknown origin counts as affected.
	Status        cve.Status        `json:"status"`
	Justification cve.Justification `json:"justification,omitempty"`
	Reason        string            `json:"reason"`
	Disagreement  *Disagreement     `json:"disagreement,omitempty"`
}

// NoData says that no source knows a file of the fix.
func (f Fix) NoData() bool { return len(f.Files) == 0 }

// Disagreement is where changelog and CNA say different things.
type Disagreement struct {
	Kind DisagreementKind `json:"kind"`
	Text string           `json:"text"`
}

// DisagreementKind is a stable word.
type DisagreementKind string

// The kinds.
const (
	// FixedEarlier: the dyads say that the fix came between, and the changelog
	// names the CVE at an upload before: Debian took the fix before stable.
	FixedEarlier DisagreementKind = "fixed_earlier"
	// FixedBefore: the changelog names it between, and by the dyads the older
	// version has the fix.
	FixedBefore DisagreementKind = "fixed_before"
	// NotPresent: the changelog names it between, and by the dyads the flaw is
	// not in the older version.
	NotPresent DisagreementKind = "not_present"
	// OtherUpload: both say that it is fixed between, in different uploads:
	// Debian took the fix before stable, or names it afterwards.
	OtherUpload DisagreementKind = "other_upload"
	// StillOpen: the changelog names it between, and by the dyads the newer
	// version lacks the fix: the CNA's data is older than the upload, or the fix
	// is Debian's own backport, or one of several parts.
	StillOpen DisagreementKind = "still_open"
)

// Delta is everything between two versions.
type Delta struct {
	From    string             `json:"from"`
	To      string             `json:"to"`
	Uploads []string           `json:"uploads"` // newest first
	Fixes   []Fix              `json:"fixes"`   // by CVE
	Changes []changelog.Change `json:"changes"` // all of them, those without a CVE too
}

// Records finds what feeds say of a CVE, and lists the CVEs that they know.
type Records interface {
	Record(cve.ID) (cve.Record, bool)
	IDs() []cve.ID
}

// Upstream is the upstream version that a Debian version is made of: 6.1.170
// of 6.1.170-3.
func Upstream(debian string) (cve.Version, error) {
	s := debian
	if _, after, ok := strings.Cut(s, ":"); ok {
		s = after
	}
	if i := strings.LastIndexByte(s, '-'); i > 0 {
		s = s[:i]
	}
	s = strings.Replace(s, "~rc", "-rc", 1)
	v, err := cve.ParseVersion(s)
	if err != nil {
		return v, fault.New(fault.Invalid, "bad_version", "package version %.80q: %w", debian, err).
			WithHint("name a version of the linux source package, such as 6.1.190-1")
	}
	return v, nil
}

// Between joins the changelog with the records. Both versions must be in the
// changelog and on one stable line.
func Between(uploads []changelog.Upload, records Records, from, to string) (Delta, error) {
	d := Delta{From: from, To: to}
	in, err := changelog.Between(uploads, from, to)
	if err != nil {
		return d, err
	}
	a, err := Upstream(from)
	if err != nil {
		return d, err
	}
	b, err := Upstream(to)
	if err != nil {
		return d, err
	}
	if !a.SameSeries(b) {
		return d, fault.New(fault.Invalid, "other_series", "versions %s and %s are of the stable lines %s and %s", from, to, a.Series(), b.Series()).
			WithHint("a livepatch cannot bring a kernel to another line")
	}
	j := join{from: a, to: b, uploads: in, records: records, named: map[cve.ID][]changelog.Change{}, bySubject: map[string][]changelog.Change{}}
	for _, u := range in {
		d.Uploads = append(d.Uploads, u.Version)
		d.Changes = append(d.Changes, u.Changes...)
		for _, c := range u.Changes {
			j.bySubject[plain(c.Subject)] = append(j.bySubject[plain(c.Subject)], c)
			for _, id := range c.CVEs {
				j.named[id] = append(j.named[id], c)
			}
		}
	}
	if j.earlier, err = namedUpTo(uploads, from); err != nil {
		return d, err
	}
	if d.Fixes, err = j.all(); err != nil {
		return d, err
	}
	return d, nil
}

// namedUpTo maps the CVEs of a version and of those before it to the first
// upload that names them.
func namedUpTo(uploads []changelog.Upload, version string) (map[cve.ID]string, error) {
	first := map[cve.ID]string{}
	for _, u := range slices.Backward(uploads) { // oldest first
		c, err := changelog.Compare(u.Version, version)
		if err != nil {
			return nil, err
		}
		if c > 0 {
			continue
		}
		for _, ch := range u.Changes {
			for _, id := range ch.CVEs {
				if _, ok := first[id]; !ok {
					first[id] = u.Version
				}
			}
		}
	}
	return first, nil
}

type join struct {
	from, to  cve.Version
	uploads   []changelog.Upload // newest first
	records   Records
	named     map[cve.ID][]changelog.Change
	bySubject map[string][]changelog.Change
	earlier   map[cve.ID]string
}

func (j join) all() ([]Fix, error) {
	var fixes []Fix
	seen := map[cve.ID]bool{}
	for _, id := range slices.Concat(slices.SortedFunc(maps.Keys(j.named), cve.Compare), j.records.IDs()) {
		if seen[id] {
			continue
		}
		seen[id] = true
		f, ok, err := j.one(id)
		if err != nil {
			return nil, err
		}
		if ok {
			fixes = append(fixes, f)
		}
	}
	slices.SortFunc(fixes, func(a, b Fix) int { return cve.Compare(a.CVE, b.CVE) })
	return fixes, nil
}

// one says what is known of a CVE; false means that it is not fixed between
// the versions.
func (j join) one(id cve.ID) (Fix, bool, error) {
	r, _ := j.records.Record(id)
	before, _ := cve.StateAt(r.Dyads, j.from)
	after, dyad := cve.StateAt(r.Dyads, j.to)
	byCNA := before == cve.StateAffected && after == cve.StateFixed
	changes := j.named[id]
	byLog := len(changes) > 0
	if !byCNA && !byLog {
		return Fix{}, false, nil
	}
	f := Fix{CVE: id, Title: r.Title, Files: slices.Clone(r.Files), Changes: changes, Status: cve.Affected}
	switch {
	case byCNA && byLog:
		f.KnownBy = ByBoth
	case byCNA:
		f.KnownBy = ByCNA
		if same := j.bySubject[plain(r.Title)]; len(same) == 1 {
			f.Changes = same
		}
	default:
		f.KnownBy = ByChangelog
	}
	if f.Title == "" && len(f.Changes) > 0 {
		f.Title = f.Changes[0].Subject
	}
	if after == cve.StateFixed && dyad.Fixed.SameSeries(j.to) {
		f.FixedIn, f.Commit = dyad.Fixed.String(), dyad.FixedCommit
	}
	logged, upstream := j.uploadOf(f.Changes), ""
	if f.FixedIn != "" && before != cve.StateFixed {
		var err error
		if upstream, err = j.uploadWith(dyad.Fixed); err != nil {
			return f, false, err
		}
	}
	f.Upload, f.UpstreamUpload = cmp.Or(logged, upstream), upstream
	j.judge(&f, before, after, byLog, r.CNA.Date)
	if f.Disagreement == nil && logged != "" && upstream != "" && logged != upstream {
		f.Disagreement = &Disagreement{OtherUpload, fmt.Sprintf("the changelog has it in %s; upstream's fix, %s, came with %s", logged, f.FixedIn, upstream)}
	}
	return f, true, nil
}

// judge says whether the version left behind has the flaw, and where the two
// sources disagree about it.
func (j join) judge(f *Fix, before, after cve.State, byLog bool, date string) {
	disagree := func(k DisagreementKind, format string, args ...any) {
		f.Reason = fmt.Sprintf(format, args...)
		f.Disagreement = &Disagreement{k, f.Reason}
	}
	earlier, had := j.earlier[f.CVE]
	switch {
	case !byLog && had:
		f.Status = cve.Fixed
		disagree(FixedEarlier, "upload %s names it already; upstream has the fix since %s", earlier, f.FixedIn)
	case before == cve.StateNotPresent:
		f.Status, f.Justification = cve.NotAffected, cve.CodeNotPresent
		disagree(NotPresent, "the changelog names it after %s; by the CNA the flaw is not in %s", j.from, j.from)
	case before == cve.StateFixed: // a flaw may come back, or be fixed in parts: the changelog is of this very package
		disagree(FixedBefore, "the changelog names it after %s; by the CNA %s has the fix", j.from, j.from)
	case before == cve.StateAffected && after == cve.StateAffected:
		disagree(StillOpen, "the changelog names it up to %s; by the CNA, as of %s, %s lacks the fix", j.to, date, j.to)
	case before == cve.StateUnknown:
		f.Reason = "the changelog names it; the CNA does not say where the flaw began"
	default:
		f.Reason = fmt.Sprintf("by the CNA the flaw is in %s and not in %s", j.from, j.to)
	}
}

// uploadOf is the first upload with one of the changes.
func (j join) uploadOf(changes []changelog.Change) string {
	for _, u := range slices.Backward(j.uploads) {
		if slices.ContainsFunc(changes, func(c changelog.Change) bool { return c.Version == u.Version }) {
			return u.Version
		}
	}
	return ""
}

// uploadWith is the first upload made of an upstream version or a later one.
func (j join) uploadWith(fixed cve.Version) (string, error) {
	for _, u := range slices.Backward(j.uploads) {
		v, err := Upstream(u.Version)
		if err != nil {
			return "", err
		}
		if v.SameSeries(fixed) && v.Compare(fixed) >= 0 {
			return u.Version, nil
		}
	}
	return "", nil
}

// plain is a subject without what differs between mainline and Debian: the
// architecture prefix that Debian turns into a tag, case and white space.
func plain(subject string) string {
	s := strings.ToLower(strings.Join(strings.Fields(subject), " "))
	for _, p := range []string{"x86/", "arm64: ", "x86: ", "s390/", "powerpc/", "mips: ", "arm: ", "riscv: ", "parisc: "} {
		s = strings.TrimPrefix(s, p)
	}
	return strings.TrimSuffix(s, ".")
}
