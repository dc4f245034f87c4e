// SPDX-License-Identifier: Apache-2.0

package translog

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/fault"
)

// Policy says which checkpoints are believed: signed by one of these logs, and
// cosigned by a quorum of these witnesses (C2SP tlog-policy).
type Policy struct {
	Logs      []*Verifier
	Witnesses []Witness
	groups    []group
	quorum    string
}

// Witness is one who cosigns. URL is where it is asked, for publishers; it may
// be empty.
type Witness struct {
	Name string // in this policy
	Key  *Verifier
	URL  string
}

type group struct {
	name    string
	need    int
	members []string
}

// MaxPolicy limits a policy, in bytes; maxItems its logs, witnesses and groups.
const (
	MaxPolicy = 64 << 10
	maxItems  = 32
	none      = "none"
)

// ParsePolicy reads a policy.
func ParsePolicy(text string) (*Policy, error) {
	p := &Policy{}
	if len(text) > MaxPolicy {
		return nil, fault.New(fault.Invalid, CodePolicy, "log policy has %d bytes, limit %d", len(text), MaxPolicy)
	}
	for i, line := range strings.Split(text, "\n") {
		if strings.IndexFunc(line, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) >= 0 {
			return nil, fault.New(fault.Invalid, CodePolicy, "log policy, line %d: a control character", i+1)
		}
		words := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == '\t' })
		if len(words) == 0 || strings.HasPrefix(words[0], "#") {
			continue
		}
		if err := p.add(words); err != nil {
			return nil, fault.New(fault.Invalid, CodePolicy, "log policy, line %d: %w", i+1, err)
		}
	}
	switch {
	case len(p.Logs) == 0:
		return nil, fault.New(fault.Invalid, CodePolicy, "log policy names no log")
	case p.quorum == "":
		return nil, fault.New(fault.Invalid, CodePolicy, "log policy has no quorum line").WithHint(`"quorum none" asks for no witness`)
	}
	return p, nil
}

func (p *Policy) add(words []string) error {
	args := words[1:]
	switch {
	case words[0] == "log" && (len(args) == 1 || len(args) == 2):
		v, err := ParseLogKey(args[0])
		if err != nil {
			return err
		}
		p.Logs = append(p.Logs, v)
		return p.unique(v)
	case words[0] == "witness" && (len(args) == 2 || len(args) == 3):
		v, err := ParseWitnessKey(args[1])
		if err != nil {
			return err
		}
		w := Witness{Name: args[0], Key: v}
		if len(args) == 3 {
			if u, err := url.Parse(args[2]); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
				return fault.New(fault.Invalid, "", "address %.200q is not http or https", args[2])
			}
			w.URL = strings.TrimSuffix(args[2], "/")
		}
		if p.defined(w.Name) {
			return fault.New(fault.Invalid, "", "name %.60q is taken", w.Name)
		}
		p.Witnesses = append(p.Witnesses, w)
		return p.unique(v)
	case words[0] == "group" && len(args) >= 3:
		return p.addGroup(args[0], args[1], args[2:])
	case words[0] == "quorum" && len(args) == 1:
		if p.quorum != "" {
			return fault.New(fault.Invalid, "", "a second quorum line")
		}
		if args[0] != none && !p.defined(args[0]) {
			return fault.New(fault.Invalid, "", "quorum %.60q is not defined above", args[0])
		}
		p.quorum = args[0]
		return nil
	}
	return fault.New(fault.Invalid, "", "%.80q is no log, witness, group or quorum", strings.Join(words, " "))
}

func (p *Policy) addGroup(name, need string, members []string) error {
	g := group{name: name, members: members}
	switch need {
	case "any":
		g.need = 1
	case "all":
		g.need = len(members)
	default:
		n, err := strconv.Atoi(need)
		if err != nil || strconv.Itoa(n) != need || n < 1 || n > len(members) {
			return fault.New(fault.Invalid, "", "group %.60q needs %.20q of %d", name, need, len(members))
		}
		g.need = n
	}
	if p.defined(name) {
		return fault.New(fault.Invalid, "", "name %.60q is taken", name)
	}
	for _, m := range members {
		used := func(o group) bool { return slices.Contains(o.members, m) }
		switch {
		case m == none || !p.defined(m):
			return fault.New(fault.Invalid, "", "member %.60q is not defined above", m)
		case slices.ContainsFunc(p.groups, used) || len(slices.DeleteFunc(slices.Clone(members), func(o string) bool { return o != m })) > 1:
			return fault.New(fault.Invalid, "", "member %.60q counts twice", m)
		}
	}
	p.groups = append(p.groups, g)
	if len(p.groups) > maxItems {
		return fault.New(fault.Invalid, "", "more than %d groups", maxItems)
	}
	return nil
}

// Log finds a log by its origin; nil means that it is none of these.
func (p *Policy) Log(origin string) *Verifier {
	i := slices.IndexFunc(p.Logs, func(v *Verifier) bool { return v.name == origin })
	if i < 0 {
		return nil
	}
	return p.Logs[i]
}

// unique refuses one key under two names, which would count twice, and two
// logs of one origin, which nobody could tell apart.
func (p *Policy) unique(v *Verifier) error {
	if len(p.Logs) > maxItems || len(p.Witnesses) > maxItems {
		return fault.New(fault.Invalid, "", "more than %d logs or witnesses", maxItems)
	}
	same, id := 0, 0
	for _, o := range p.verifiers() {
		if bytes.Equal(o.public, v.public) {
			same++
		}
		if o.name == v.name && (o.id == v.id || o.kind == typeEd25519 && v.kind == typeEd25519) {
			id++
		}
	}
	if same > 1 || id > 1 {
		return fault.New(fault.Invalid, "", "key or name of %.60q is listed twice", v.name)
	}
	return nil
}

func (p *Policy) defined(name string) bool {
	return name == none || slices.ContainsFunc(p.Witnesses, func(w Witness) bool { return w.Name == name }) ||
		slices.ContainsFunc(p.groups, func(g group) bool { return g.name == name })
}

func (p *Policy) verifiers() []*Verifier {
	all := slices.Clone(p.Logs)
	for _, w := range p.Witnesses {
		all = append(all, w.Key)
	}
	return all
}

// Least is the smallest number of witnesses that can fill the quorum.
func (p *Policy) Least() int { return p.least(p.quorum) }

func (p *Policy) least(name string) int {
	i := slices.IndexFunc(p.groups, func(g group) bool { return g.name == name })
	switch {
	case name == none:
		return 0
	case i < 0:
		return 1
	}
	var each []int
	for _, m := range p.groups[i].members {
		each = append(each, p.least(m))
	}
	slices.Sort(each)
	sum := 0
	for _, n := range each[:p.groups[i].need] {
		sum += n
	}
	return sum
}

func (p *Policy) filled(name string, signed []string) bool {
	i := slices.IndexFunc(p.groups, func(g group) bool { return g.name == name })
	switch {
	case name == none:
		return true
	case i < 0:
		return slices.Contains(signed, name)
	}
	n := 0
	for _, m := range p.groups[i].members {
		if p.filled(m, signed) {
			n++
		}
	}
	return n >= p.groups[i].need
}

// profileLeast is how many witnesses a profile of trust anchors asks for
// (docs/adr/0027).
var profileLeast = map[string]int{"lab": 0, "small": 1, "full": 2}

// ProfileLeast is how many witnesses an anchor of a profile must ask for.
func ProfileLeast(profile string) int { return profileLeast[profile] }

// Require reads the policy of a trust anchor and refuses one that promises
// less than the anchor's profile does. An anchor without a policy asks for no
// log: the result is nil.
func Require(text, profile string) (*Policy, error) {
	if text == "" {
		return nil, nil
	}
	p, err := ParsePolicy(text)
	if err != nil {
		return nil, fault.New(fault.Untrusted, CodePolicy, "trust anchor: %w", err)
	}
	least, known := profileLeast[profile]
	if !known {
		return nil, fault.New(fault.Untrusted, CodePolicy, "trust anchor: profile %.40q has no rule for its log", profile)
	}
	if p.Least() < least {
		return nil, fault.New(fault.Untrusted, CodePolicy, "trust anchor: profile %s needs %d witnesses or more, its log policy asks for %d", profile, least, p.Least())
	}
	return p, nil
}

// Open verifies a checkpoint: a log's signature and the quorum of witnesses.
func (p *Policy) Open(signed []byte) (Checkpoint, error) { return p.open(signed, p.quorum) }

// OpenUnwitnessed verifies the log's signature only. What it returns shows
// what the log has said, not what anybody has checked.
func (p *Policy) OpenUnwitnessed(signed []byte) (Checkpoint, error) { return p.open(signed, none) }

func (p *Policy) open(signed []byte, quorum string) (Checkpoint, error) {
	var c Checkpoint
	if len(signed) > MaxCheckpoint {
		return c, fault.New(fault.Untrusted, CodeMalformed, "checkpoint has %d bytes, limit %d", len(signed), MaxCheckpoint)
	}
	var all []note.Verifier
	for _, v := range p.verifiers() {
		all = append(all, v)
	}
	n, err := note.Open(signed, note.VerifierList(all...))
	if _, unknown := errors.AsType[*note.UnverifiedNoteError](err); unknown {
		return c, fault.New(fault.Untrusted, CodeUntrusted, "checkpoint is signed by no known log").
			WithHint("check that the trust anchor belongs to the publisher whose repository this is, or get the publisher's new anchor")
	}
	if _, wrong := errors.AsType[*note.InvalidSignatureError](err); wrong {
		return c, fault.New(fault.Untrusted, CodeUntrusted, "checkpoint: %w", err)
	}
	if err != nil {
		return c, fault.New(fault.Untrusted, CodeMalformed, "checkpoint: %w", err)
	}
	if c, err = parseBody(n.Text); err != nil {
		return c, err
	}
	c.Signed = bytes.Clone(signed)
	by := func(v *Verifier) bool {
		return slices.ContainsFunc(n.Sigs, func(s note.Signature) bool { return s.Name == v.name && s.Hash == v.id })
	}
	i := slices.IndexFunc(p.Logs, by)
	switch {
	case i < 0:
		return Checkpoint{}, fault.New(fault.Untrusted, CodeUntrusted, "checkpoint of %.80q is not signed by a known log", c.Origin)
	case p.Log(c.Origin) == nil || !by(p.Log(c.Origin)):
		return Checkpoint{}, fault.New(fault.Untrusted, CodeOrigin, "checkpoint is of log %.80q and signed by log %q", c.Origin, p.Logs[i].name)
	}
	c.Log = p.Log(c.Origin)
	var cosigned []string
	for _, w := range p.Witnesses {
		if by(w.Key) {
			cosigned = append(cosigned, w.Name)
		}
	}
	if !p.filled(quorum, cosigned) {
		return Checkpoint{}, fault.New(fault.Untrusted, CodeQuorum, "checkpoint %d of %s is cosigned by %d of %d witnesses (%s); that is no quorum", c.Size, c.Origin, len(cosigned), len(p.Witnesses), strings.Join(cosigned, ", ")).
			WithHint("the publisher must get the cosignatures before it publishes: klatch-forge publish")
	}
	return c, nil
}

// CosignedAt is a time that a checkpoint's cosignatures show to be past: the
// earliest of them, so that no single witness can tell the future. Zero where
// nobody has cosigned. The checkpoint was opened before.
func (p *Policy) CosignedAt(signed []byte) time.Time {
	var first time.Time
	for _, w := range p.Witnesses {
		n, err := note.Open(signed, note.VerifierList(w.Key))
		if err != nil {
			continue
		}
		for _, s := range n.Sigs {
			b, err := base64.StdEncoding.DecodeString(s.Base64)
			if err != nil || len(b) < 12 { // four bytes of key id, eight of time (C2SP tlog-cosignature)
				continue
			}
			at := time.Unix(int64(binary.BigEndian.Uint64(b[4:])), 0) //nolint:gosec // a time after the year 292 billion is no earlier one
			if first.IsZero() || at.Before(first) {
				first = at
			}
		}
	}
	return first
}

// Cosigners are the names of the policy's witnesses whose cosignature a
// checkpoint has.
func (p *Policy) Cosigners(signed []byte) []string {
	var names []string
	for _, w := range p.Witnesses {
		if n, err := note.Open(signed, note.VerifierList(w.Key)); err == nil && len(n.Sigs) > 0 {
			names = append(names, w.Name)
		}
	}
	return names
}
