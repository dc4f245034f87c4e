// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"fmt"
	"net/url"
	"strings"
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

const (
	vexType    = "https://openvex.dev/ns/v0.2.0"
	vexContext = "https://openvex.dev/ns/v0.2.0"
	vexAuthor  = "urn:klatch:analyst:"
)

// VEX is an OpenVEX 0.2 document (github.com/openvex/spec): what is known of
// CVEs on a kernel build with this livepatch loaded.
type VEX struct {
	Context    string         `json:"@context"`
	ID         string         `json:"@id"`
	Author     string         `json:"author"`
	Timestamp  time.Time      `json:"timestamp"`
	Version    int            `json:"version"`
	Statements []VEXStatement `json:"statements"`
}

// VEXStatement is the word on one CVE.
type VEXStatement struct {
	Vulnerability   VEXName           `json:"vulnerability"`
	Products        []VEXProduct      `json:"products"`
	Status          cve.Status        `json:"status"`
	Notes           string            `json:"status_notes,omitempty"`
	Justification   cve.Justification `json:"justification,omitempty"`
	ImpactStatement string            `json:"impact_statement,omitempty"`
	ActionStatement string            `json:"action_statement,omitempty"`
}

// VEXName names a vulnerability.
type VEXName struct {
	Name cve.ID `json:"name"`
}

// VEXProduct names a product by its package URL.
type VEXProduct struct {
	ID string `json:"@id"`
}

// Product is the package URL of a kernel build with one livepatch loaded.
func Product(b kernel.Build, s livepatch.Sequence) string {
	return fmt.Sprintf("pkg:generic/klatch/%s/%s/%s@%d?build_id=%s", url.PathEscape(string(b.Distro)), url.PathEscape(string(b.Arch)),
		strings.ReplaceAll(url.PathEscape(string(b.Release)), "+", "%2B"), s, b.ID)
}

// NewVEX is the document of one analyst. It is about the given livepatch.
func NewVEX(analyst string, k kernel.Build, s livepatch.Sequence, statements []VEXStatement, at time.Time) *VEX {
	product := Product(k, s)
	for i := range statements {
		statements[i].Products = []VEXProduct{{product}}
	}
	return &VEX{Context: vexContext, ID: "urn:klatch:vex:" + product, Author: vexAuthor + analyst, Timestamp: At(at), Version: 1, Statements: statements}
}

func (v *VEX) role() Role { return Analyst }

func (v *VEX) claim() claim {
	return claim{strings.TrimPrefix(v.Author, vexAuthor), v.Timestamp, kernel.Build{}, 0}
}

// check holds to the rules of the OpenVEX specification, "Status Labels".
func (v *VEX) check() error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Untrusted, "", "VEX: "+format, args...)
	}
	if v.Context != vexContext || v.ID == "" || v.Version != 1 || !strings.HasPrefix(v.Author, vexAuthor) || v.Timestamp.IsZero() {
		return bad("context, id, author, time or version are not ours")
	}
	seen := map[cve.ID]bool{}
	for _, s := range v.Statements {
		id := s.Vulnerability.Name
		if _, err := cve.Parse(string(id)); err != nil || seen[id] {
			return bad("%.60q is no CVE id, or there twice", id)
		}
		seen[id] = true
		if len(s.Products) != 1 {
			return bad("%s names %d products, want one", id, len(s.Products))
		}
		switch s.Status {
		case cve.Fixed, cve.UnderInvestigation:
		case cve.Affected:
			if s.ActionStatement == "" {
				return bad("%s is affected, and no action is named", id)
			}
		case cve.NotAffected:
			if s.Justification != "" && !s.Justification.Known() {
				return bad("%s has justification %.60q", id, s.Justification)
			}
			if s.Justification == "" && s.ImpactStatement == "" {
				return bad("%s is not affected, and nothing says why", id)
			}
		default:
			return bad("%s has status %.40q", id, s.Status)
		}
	}
	return nil
}
