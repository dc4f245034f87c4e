// SPDX-License-Identifier: Apache-2.0

// Package rollout describes the operator's own repository, which says what is
// wanted here and now: the tiers and their order, what each tier is to run,
// and which livepatches people have promoted to which tier. The publisher's
// repository says what is genuine; a machine loads what both agree on.
//
// It is pure: bytes, times and facts come in, a decision goes out. Signatures
// and expiry are checked before, by package tufclient; who may sign what is
// the repository's own matter:
//
//	policy/tiers.json                        the operator's people (role "targets")
//	select/TIER/BUILD-ID.json                the server's online key (role "select")
//	promotion/TIER/SHA256-OF-BUNDLE.json     the approvers (role "promotion")
//
// Each file has one form, and what is not the encoding of what was read is
// refused. Start with Decide.
package rollout

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

// The roles of the repository. Select and promotion are delegated by targets;
// the server holds the key of select and of no role that delegates.
const (
	RoleTargets   = "targets"
	RoleSelect    = "select"
	RolePromotion = "promotion"
)

// Version words of the files.
const (
	TiersFormat     = "klatch-tiers/1"
	SelectionFormat = "klatch-select/1"
	PromotionFormat = "klatch-promotion/1"
)

// Limits of foreign bytes.
const (
	MaxTiersFile     = 64 << 10
	MaxSelectionFile = 8 << 10
	MaxPromotionFile = 8 << 10
	MaxTiers         = 32
	MaxSoak          = 24 * 365 // hours
	maxReason        = 500      // bytes
)

// TiersPath is where the tiers lie in the repository.
const TiersPath = "policy/tiers.json"

// SelectPath is where a tier's selection for one kernel build lies.
func SelectPath(tier string, id kernel.BuildID) string {
	return fmt.Sprintf("%s/%s/%s.json", RoleSelect, tier, id)
}

// PromotionPath is where the promotion of one bundle to a tier lies.
func PromotionPath(tier, sha256 string) string {
	return fmt.Sprintf("%s/%s/%s.json", RolePromotion, tier, sha256)
}

// Tier is a group of machines that get livepatches at the same time.
type Tier struct {
	Name string `json:"name"`
	// SoakHours is how long a livepatch must have been in the tier before
	// until this one may be opened for it. The first tier has none.
	SoakHours int `json:"soak_hours"`
}

// Soak is SoakHours as a duration.
func (t Tier) Soak() time.Duration { return time.Duration(t.SoakHours) * time.Hour }

// Tiers is the ordered list: a new livepatch lands in the first tier and goes
// to the others by promotion only.
type Tiers struct {
	Format string `json:"format"`
	Tiers  []Tier `json:"tiers"`
}

var tierName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)

// CheckTierName refuses what cannot name a tier.
func CheckTierName(name string) error {
	if !tierName.MatchString(name) {
		return fault.New(fault.Invalid, "bad_tier", "tier %.60q is not a name of lower-case letters, digits and dashes", name)
	}
	return nil
}

// Index is a tier's place; -1 if it is not in the list.
func (t Tiers) Index(name string) int {
	return slices.IndexFunc(t.Tiers, func(x Tier) bool { return x.Name == name })
}

func (t Tiers) validate() error {
	if t.Format != TiersFormat || len(t.Tiers) == 0 || len(t.Tiers) > MaxTiers {
		return bad("format %.40q with %d tiers, want %q with 1 to %d", t.Format, len(t.Tiers), TiersFormat, MaxTiers)
	}
	for i, x := range t.Tiers {
		if err := CheckTierName(x.Name); err != nil {
			return err
		}
		if t.Index(x.Name) != i {
			return bad("tier %s is listed twice", x.Name)
		}
		if x.SoakHours < 0 || x.SoakHours > MaxSoak {
			return bad("tier %s soaks %d hours, limit %d", x.Name, x.SoakHours, MaxSoak)
		}
	}
	if t.Tiers[0].SoakHours != 0 {
		return bad("the first tier %s cannot soak: nothing is before it", t.Tiers[0].Name)
	}
	return nil
}

// Encode writes the one form.
func (t Tiers) Encode() ([]byte, error) { return encode("tiers", t) }

// ParseTiers reads policy/tiers.json.
func ParseTiers(b []byte) (Tiers, error) { return parse[Tiers]("tiers", b, MaxTiersFile) }

// Selection is what one tier is to run on one kernel build: the newest
// livepatch that is open for it, or a hold.
type Selection struct {
	Format   string             `json:"format"`
	Tier     string             `json:"tier"`
	Kernel   kernel.Build       `json:"kernel"`
	Sequence livepatch.Sequence `json:"sequence"`
	Target   string             `json:"target"` // path in the publisher's repository
	Bytes    int64              `json:"bytes"`
	SHA256   string             `json:"sha256"` // of the bundle, lower-case hexadecimal
	Since    time.Time          `json:"since"`  // since when the tier has this one; for people, no machine counts from it
	Hold     bool               `json:"hold"`   // machines stay with what they have
	Reason   string             `json:"reason"` // of the hold
}

var hex64 = regexp.MustCompile(`^[0-9a-f]{64}$`)

// targetPath is what livepatch.Manifest.TargetPath gives for it.
func targetPath(k kernel.Build, s livepatch.Sequence) string {
	m := livepatch.Manifest{Kernel: k, Module: livepatch.Module{Name: s.ModuleName()}}
	return m.TargetPath()
}

func (s Selection) validate() error {
	if s.Format != SelectionFormat {
		return bad("format %.40q, want %q", s.Format, SelectionFormat)
	}
	if err := CheckTierName(s.Tier); err != nil {
		return err
	}
	if s.Kernel.ID.IsZero() || s.Kernel.Release == "" || s.Kernel.Arch == "" || s.Kernel.Distro == "" || s.Sequence == 0 {
		return bad("kernel or sequence is missing")
	}
	if want := targetPath(s.Kernel, s.Sequence); s.Target != want {
		return bad("target %.160q of sequence %d, want %q", s.Target, s.Sequence, want)
	}
	if s.Bytes <= 0 || s.Bytes > livepatch.MaxBundle || !hex64.MatchString(s.SHA256) {
		return bad("%d bytes, or a digest that is not SHA-256 in hexadecimal", s.Bytes)
	}
	if s.Hold != (s.Reason != "") {
		return bad("a hold has a reason, and only a hold has one")
	}
	return CheckReason(s.Reason)
}

// Encode writes the one form.
func (s Selection) Encode() ([]byte, error) { return encode("selection", s) }

// ParseSelection reads select/TIER/BUILD-ID.json.
func ParseSelection(b []byte) (Selection, error) {
	return parse[Selection]("selection", b, MaxSelectionFile)
}

// Promotion opens one tier for one bundle. People sign it, so all that a
// machine counts from is in here and not in the selection.
type Promotion struct {
	Format string `json:"format"`
	Tier   string `json:"tier"`
	Target string `json:"target"` // path in the publisher's repository
	SHA256 string `json:"sha256"` // of the bundle
	// Since is when the tier before got it: the soak is counted from here.
	Since      time.Time `json:"since"`
	PromotedAt time.Time `json:"promoted_at"` // open at the soonest from here on
	Urgent     bool      `json:"urgent"`      // does not wait for the soak
	Reason     string    `json:"reason"`
}

var targetName = regexp.MustCompile(`^[0-9A-Za-z_][0-9A-Za-z.+~_-]*(/[0-9A-Za-z_][0-9A-Za-z.+~_-]*)*$`)

func (p Promotion) validate() error {
	if p.Format != PromotionFormat {
		return bad("format %.40q, want %q", p.Format, PromotionFormat)
	}
	if err := CheckTierName(p.Tier); err != nil {
		return err
	}
	switch {
	case !hex64.MatchString(p.SHA256):
		return bad("digest is not SHA-256 in hexadecimal")
	case len(p.Target) > 512 || !targetName.MatchString(p.Target): // people read it before they sign
		return bad("target %.160q is no path of letters, digits and . + ~ _ -", p.Target)
	case p.Since.IsZero() || p.Since.After(p.PromotedAt):
		return bad("since %s, promoted at %s", p.Since, p.PromotedAt)
	case p.Reason == "":
		return bad("no reason is given")
	}
	return CheckReason(p.Reason)
}

// Opens is the time from which the tier may take the bundle.
func (p Promotion) Opens(t Tier) time.Time {
	soaked := p.Since.Add(t.Soak())
	if p.Urgent || soaked.Before(p.PromotedAt) {
		return p.PromotedAt
	}
	return soaked
}

// Encode writes the one form.
func (p Promotion) Encode() ([]byte, error) { return encode("promotion", p) }

// ParsePromotion reads promotion/TIER/SHA256.json.
func ParsePromotion(b []byte) (Promotion, error) {
	return parse[Promotion]("promotion", b, MaxPromotionFile)
}

// CheckReason refuses a text that a terminal could obey, or that is too long.
func CheckReason(s string) error {
	if len(s) > maxReason || !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return bad("reason of %d bytes with characters that cannot be printed, or over %d bytes", len(s), maxReason)
	}
	return nil
}

// bad is why a file is refused; encode says of which sort it is.
func bad(format string, args ...any) error { return fmt.Errorf(format, args...) }

func malformed(what string, err error) error {
	return fault.New(fault.Untrusted, fault.Code(what+"_malformed"), "%s: %w", what, err)
}

func encode[T interface{ validate() error }](what string, v T) ([]byte, error) {
	if err := v.validate(); err != nil {
		return nil, malformed(what, err)
	}
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return nil, malformed(what, err)
	}
	return append(b, '\n'), nil
}

// parse reads what encode wrote, and nothing else: unknown or repeated
// members, other spellings of the same value and trailing bytes are refused.
func parse[T interface{ validate() error }](what string, b []byte, limit int) (T, error) {
	var v, none T
	if len(b) > limit {
		return none, malformed(what, bad("%d bytes, limit %d", len(b), limit))
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		return none, malformed(what, err)
	}
	again, err := encode(what, v)
	if err != nil {
		return none, err
	}
	if !bytes.Equal(again, b) { // bytes after the end too
		return none, malformed(what, bad("not in its one form"))
	}
	return v, nil
}
