// SPDX-License-Identifier: Apache-2.0

package triage

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/changelog"
)

// Reviewed is a person's decision: cve/YEAR/CVE-….yaml in the data folder,
// text that is reviewed in git like code.
type Reviewed struct {
	CVE           cve.ID            `yaml:"cve"`
	Series        []string          `yaml:"series,omitempty"` // none means all
	Status        cve.Status        `yaml:"status"`
	Justification cve.Justification `yaml:"justification,omitempty"` // of not_affected
	Treatment     Treatment         `yaml:"treatment"`
	Reason        string            `yaml:"reason"`
	Author        string            `yaml:"author"`
	Date          string            `yaml:"date"` // YYYY-MM-DD
	// FixedIn is the first version of the one series' source package that has the
	// fix: it says which kernel builds a decision of reboot or defer concerns.
	FixedIn string `yaml:"fixed_in,omitempty"`
}

// Path is where the decision belongs in the data folder.
func (v Reviewed) Path() string { return reviewPath(v.CVE) }

func reviewPath(id cve.ID) string {
	year, _, _ := strings.Cut(strings.TrimPrefix(string(id), "CVE-"), "-")
	return path.Join("cve", year, string(id)+".yaml")
}

// For says whether the decision speaks of a series.
func (v Reviewed) For(series string) bool {
	return len(v.Series) == 0 || slices.Contains(v.Series, series)
}

// Limits of reviewed files.
const (
	maxReview  = 64 << 10
	maxReviews = 100_000
)

// ParseReviewed reads one file. name is its path in the data folder.
func ParseReviewed(name string, b []byte, today time.Time) (Reviewed, error) {
	var v Reviewed
	dec := yaml.NewDecoder(bytes.NewReader(b))
	dec.KnownFields(true)
	if err := dec.Decode(&v); err != nil {
		return v, err
	}
	if err := dec.Decode(new(Reviewed)); !errors.Is(err, io.EOF) {
		return v, errors.New("more than one document")
	}
	return v, v.check(name, today)
}

func (v Reviewed) check(name string, today time.Time) error {
	if _, err := cve.Parse(string(v.CVE)); err != nil {
		return err
	}
	if want := v.Path(); name != want {
		return fmt.Errorf("it speaks of %s, whose file is %s", v.CVE, want)
	}
	if !v.Status.Known() {
		return fmt.Errorf("status %.40q is none of VEX: not_affected, affected, fixed, under_investigation", string(v.Status))
	}
	switch v.Treatment {
	case Livepatch, Reboot, Defer, BelowPolicy, NotAffected:
	case Unrated, NoData:
		return fmt.Errorf("treatment %s is not one that a person decides", v.Treatment)
	default:
		return fmt.Errorf("treatment %.40q is unknown: use livepatch, reboot, defer, below_policy or not_affected", string(v.Treatment))
	}
	if (v.Status == cve.NotAffected || v.Status == cve.Fixed) != (v.Treatment == NotAffected) {
		return fmt.Errorf("status %s does not go with treatment %s", v.Status, v.Treatment)
	}
	if (v.Status == cve.NotAffected) != (v.Justification != "") {
		return errors.New("a justification belongs to status not_affected, and to no other")
	}
	if v.Justification != "" && !v.Justification.Known() {
		return fmt.Errorf("justification %.60q is none of VEX", string(v.Justification))
	}
	for field, text := range map[string]string{"reason": v.Reason, "author": v.Author} {
		if strings.TrimSpace(text) == "" {
			return fmt.Errorf("it has no %s", field)
		}
	}
	for _, s := range v.Series {
		if s == "" || strings.ContainsAny(s, " \t\n/") {
			return fmt.Errorf("series %.40q", s)
		}
	}
	if err := v.checkFixedIn(); err != nil {
		return err
	}
	date, err := time.Parse(time.DateOnly, v.Date)
	if err != nil {
		return fmt.Errorf("date %.40q is not like 2026-08-21", v.Date)
	}
	if date.After(today.AddDate(0, 0, 1)) { // a day for time zones
		return fmt.Errorf("date %s is in the future", v.Date)
	}
	return nil
}

func (v Reviewed) checkFixedIn() error {
	switch {
	case v.FixedIn == "":
		return nil
	case v.Treatment != Reboot && v.Treatment != Defer:
		return fmt.Errorf("fixed_in does not go with treatment %s", v.Treatment)
	case len(v.Series) != 1:
		return errors.New("fixed_in is a version of one series: name it")
	}
	if _, err := changelog.Compare(v.FixedIn, v.FixedIn); err != nil {
		return fmt.Errorf("fixed_in: %w", err)
	}
	return nil
}

// Finding is what lint has against a reviewed file.
type Finding struct {
	File string `json:"file"`
	Text string `json:"text"`
}

// Reviews are all reviewed decisions of a data folder.
type Reviews map[cve.ID]Reviewed

// Of finds the decision for a CVE and a series; nil is none.
func (r Reviews) Of(id cve.ID, series string) *Reviewed {
	if v, ok := r[id]; ok && v.For(series) {
		return &v
	}
	return nil
}

// Lint reads all reviewed decisions and says what is wrong with the others.
func Lint(dir string, today time.Time) (Reviews, []Finding, error) {
	all := Reviews{}
	var findings []Finding
	root := filepath.Join(dir, "cve")
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if !strings.HasSuffix(rel, ".yaml") {
			if !strings.HasPrefix(e.Name(), ".") && !strings.HasSuffix(rel, ".md") {
				findings = append(findings, Finding{rel, "it is no decision: they are named cve/YEAR/CVE-….yaml"})
			}
			return nil
		}
		if len(all) >= maxReviews {
			return fault.New(fault.Invalid, "bad_review", "over %d decisions in %s", maxReviews, root)
		}
		b, err := durable.ReadFile(p, maxReview)
		if err != nil {
			findings = append(findings, Finding{rel, err.Error()})
			return nil //nolint:nilerr // it is a finding
		}
		v, err := ParseReviewed(rel, b, today)
		if err != nil {
			findings = append(findings, Finding{rel, strings.Join(strings.Fields(err.Error()), " ")})
			return nil
		}
		all[v.CVE] = v
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return all, findings, err
}

// Load reads all reviewed decisions, and refuses a folder with a bad one: what
// a person decided must not be lost silently.
func Load(dir string, today time.Time) (Reviews, error) {
	all, findings, err := Lint(dir, today)
	if err != nil {
		return nil, err
	}
	if len(findings) > 0 {
		return nil, fault.New(fault.Invalid, "bad_review", "%d bad decisions; the first: %s: %s", len(findings), findings[0].File, findings[0].Text).
			WithHint("list them: klatch-forge triage lint")
	}
	return all, nil
}
