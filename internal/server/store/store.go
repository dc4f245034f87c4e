// SPDX-License-Identifier: Apache-2.0

// Package store says what the server remembers, one interface per noun:
// machines, tokens and reports. It holds what machines did, never what people
// decided and never what is published: those are signed files, and the
// database can be lost without losing them.
//
// Contract of all methods: safe for concurrent use; what was written is on
// disk when the call returns; an error with a kind (package fault) is the
// store's answer, one without is a broken store. Package storetest checks an
// implementation.
package store

import (
	"context"
	"time"

	"klatch/internal/wire"
)

// Page limits of lists.
const (
	DefaultPage = 100
	MaxPage     = 1000
)

// Machine is one machine as the server knows it.
type Machine struct {
	ID        string // "mch_…"
	Tier      string
	KeyDigest string     // SHA-256 of the public key that it enrolled with, hexadecimal; empty if not known
	Enrolled  time.Time  // first seen, if the server forgot the enrollment
	LastSeen  time.Time  // last contact of any sort
	StateAt   time.Time  // when State was true; zero if it never said
	State     wire.State // zero until the first check or report
	Facts     wire.Facts
}

// Machines remembers machines and their newest state.
type Machines interface {
	// Seen notes a contact of a machine whose certificate was verified. A
	// machine that is not known is added with the tier, because its
	// certificate proves an enrollment that this store forgot. State and facts
	// replace the stored ones unless those are of a later time.
	Seen(ctx context.Context, s Sighting) error
	// Machine finds one; not_found if there is none.
	Machine(ctx context.Context, id string) (Machine, error)
	// Machines lists by id, after the id given, limit at most.
	Machines(ctx context.Context, after string, limit int) ([]Machine, error)
}

// Sighting is one contact.
type Sighting struct {
	MachineID string
	Tier      string // for a machine that is not known
	Seen      time.Time
	StateAt   time.Time
	State     wire.State
	Facts     wire.Facts
}

// Role says what a token makes of who redeems it. Stored: never rename one.
type Role string

// The roles.
const (
	ForMachine Role = "machine"
	ForMirror  Role = "mirror"
)

// Mirror is a server below this one.
type Mirror struct {
	ID        string // "mir_…"
	Name      string // what its operator calls it; believed for pages only
	KeyDigest string // as of a machine
	Joined    time.Time
	LastSeen  time.Time
	Removed   time.Time // zero: it may read
}

// Mirrors remembers the servers that copy from this one.
type Mirrors interface {
	// RedeemMirror uses a token for a mirror, as Tokens.Redeem does for a
	// machine. The time is m.Joined.
	RedeemMirror(ctx context.Context, digest string, m Mirror) (Mirror, error)
	// MirrorSeen notes a contact of a mirror whose certificate was verified,
	// and adds one that is not known. Code mirror_removed, denied, if it was
	// removed.
	MirrorSeen(ctx context.Context, id string, at time.Time) error
	// Mirrors lists all, removed ones too, by id; store.MaxPage at most.
	Mirrors(ctx context.Context) ([]Mirror, error)
	// RemoveMirror shuts one out; not_found if there is none.
	RemoveMirror(ctx context.Context, id string, at time.Time) error
}

// Token is an enrollment token, of which only the digest is known.
type Token struct {
	Digest  string // SHA-256 of the secret, hexadecimal
	Role    Role   // empty: ForMachine
	Tier    string
	Created time.Time
	Expires time.Time
	Uses    int // how many machines may use it
	Used    int
}

// Tokens remembers enrollment tokens.
type Tokens interface {
	// AddToken stores a new one; conflict if the digest is taken.
	AddToken(ctx context.Context, t Token) error
	// Redeem uses a token for a machine and adds the machine, both or none.
	// The time is m.Enrolled; the tier is the token's.
	// The same key with the same token again, before the token expires, gives
	// the machine that was added the first time: its answer got lost. Codes:
	// token_unknown, token_expired, token_used, token_role, all denied.
	Redeem(ctx context.Context, digest string, m Machine) (Machine, error)
	// Tokens lists those that are not expired at the time, newest first.
	Tokens(ctx context.Context, now time.Time) ([]Token, error)
}

// StoredReport is a report as it was received.
type StoredReport struct {
	ID        int64 // order of arrival
	MachineID string
	Received  time.Time
	Report    wire.Report
}

// Reports remembers what machines reported.
type Reports interface {
	// AddReport stores a report once per machine and key, and the sighting
	// with it; fresh says whether this was the first time. A repetition
	// changes nothing but the time of the last contact. Of each machine only
	// the newest MaxReports are kept: one machine cannot fill the disk.
	AddReport(ctx context.Context, s Sighting, r wire.Report) (fresh bool, err error)
	// Reports lists newest first, before the id given (0: from the newest),
	// limit at most; of one machine, or of all if it is empty.
	Reports(ctx context.Context, machineID string, before int64, limit int) ([]StoredReport, error)
}

// Store is all of it.
type Store interface {
	Machines
	Tokens
	Reports
	Mirrors
}

// MaxReports is how many reports of one machine are kept: months of an honest
// one's.
const MaxReports = 200

// Clamp brings a caller's limit into range.
func Clamp(limit int) int {
	if limit <= 0 {
		return DefaultPage
	}
	return min(limit, MaxPage)
}
