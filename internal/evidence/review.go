// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

const reviewType = "urn:klatch:review:1"

// Decision is a reviewer's word.
type Decision string

// The decisions.
const (
	Approved Decision = "approved"
	Rejected Decision = "rejected"
)

// Review says that a person read exactly these source patches, for this
// livepatch, with these warnings of the builder.
type Review struct {
	Decision Decision           `json:"decision"`
	Reviewer string             `json:"reviewer"`
	Kernel   kernel.Build       `json:"kernel"`
	Sequence livepatch.Sequence `json:"sequence"`
	Sources  []Source           `json:"sources"`
	Warnings []string           `json:"warnings"`
	Comment  string             `json:"comment"`
	Finished time.Time          `json:"finished"`
}

const maxComment = 16 << 10

func (r *Review) role() Role { return Reviewer }

func (r *Review) claim() claim { return claim{r.Reviewer, r.Finished, r.Kernel, r.Sequence} }

func (r *Review) check() error {
	switch {
	case r.Decision != Approved && r.Decision != Rejected:
		return fault.New(fault.Untrusted, "", "review: decision %.40q", r.Decision)
	case len(r.Sources) == 0:
		return fault.New(fault.Untrusted, "", "review: of no source patch")
	case len(r.Comment) > maxComment:
		return fault.New(fault.Invalid, "comment_too_long", "review: comment of %d bytes, limit %d", len(r.Comment), maxComment)
	}
	return nil
}
