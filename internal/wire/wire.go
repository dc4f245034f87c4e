// SPDX-License-Identifier: Apache-2.0

// Package wire is the JSON that a machine and a server exchange, version 1.
// Names and meanings never change within a version; fields are only added,
// with a zero value that means "not said". Paths:
//
//	POST /v1/enroll   EnrollRequest → EnrollAnswer   one-use token in the body
//	POST /v1/renew    RenewRequest  → RenewAnswer    machine certificate
//	POST /v1/check    CheckRequest  → CheckAnswer    machine certificate
//	POST /v1/reports  Report        → 204            machine certificate
//	POST /v1/join     JoinRequest   → JoinAnswer     one-use token in the body
//	POST /v1/join/renew RenewRequest → RenewAnswer   mirror certificate
//	GET  /metadata/…  /targets/…                     the TUF repository; public, or for certificates of this server
//
// Errors are problem documents (RFC 9457), see Problem.
package wire

import (
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/fleet"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/stall"
	"klatch/internal/tracer"
)

// MaxBody limits every body of this package in both directions, in bytes.
const MaxBody = 256 << 10

// MaxText limits a text for people inside a body, in bytes. A machine shortens
// what it says; the server refuses what is longer.
const MaxText = 2000

// MaxQueuedReports limits what a machine keeps while the server is away; the
// oldest go first, because the newest tells the present state.
const MaxQueuedReports = 200

// Token is an enrollment token as a person handles it:
// "klatch1.<secret>.<ca>", secret and ca base64url without padding; secret is
// 32 random bytes, ca the SHA-256 of the server's CA certificate in DER. So a
// machine knows the right server before it says the secret.
type Token string

// Facts is what a machine says about itself. The server believes it for
// targeting and for pages, never for trust.
type Facts struct {
	Hostname string         `json:"hostname"`
	Kernel   kernel.Build   `json:"kernel,omitzero"`     // absent: the machine could not find out
	BootID   string         `json:"boot_id"`             // /proc/sys/kernel/random/boot_id
	Lockdown string         `json:"lockdown"`            // none, integrity, confidentiality or unknown
	Enforced string         `json:"module_sig_enforced"` // yes, no or unknown
	Version  string         `json:"version"`             // of klatchd
	Newer    kernel.Release `json:"newer_kernel,omitempty"`

	SecureBoot string `json:"secure_boot,omitempty"`      // of UEFI: on, off or unknown
	KeyTrust   string `json:"module_key_trust,omitempty"` // of the publisher's module key by the kernel: trusted, refused, not_enforced or unknown
}

// EnrollRequest asks for a machine credential.
type EnrollRequest struct {
	Token Token  `json:"token"`
	CSR   []byte `json:"csr"` // PKCS #10 in DER, ECDSA P-256; its subject is ignored
	Facts Facts  `json:"facts"`
}

// EnrollAnswer is the credential.
type EnrollAnswer struct {
	MachineID   string    `json:"machine_id"` // "mch_…"
	Tier        string    `json:"tier"`
	Certificate []byte    `json:"certificate"` // X.509 in DER, subject CN is the machine id
	CA          []byte    `json:"ca"`          // X.509 in DER
	Expires     time.Time `json:"expires"`
}

// RenewRequest asks for a fresh certificate before the old one expires.
type RenewRequest struct {
	CSR []byte `json:"csr"`
}

// RenewAnswer is the fresh certificate.
type RenewAnswer struct {
	Certificate []byte    `json:"certificate"`
	Expires     time.Time `json:"expires"`
}

// JoinRequest asks for a mirror's credential. A token for machines does not
// do.
type JoinRequest struct {
	Token Token  `json:"token"`
	CSR   []byte `json:"csr"`
	Name  string `json:"name"` // what its operator calls it
}

// JoinAnswer is the credential.
type JoinAnswer struct {
	MirrorID    string    `json:"mirror_id"` // "mir_…"
	Certificate []byte    `json:"certificate"`
	CA          []byte    `json:"ca"`
	Expires     time.Time `json:"expires"`
}

// CheckRequest is one look for something newer.
type CheckRequest struct {
	Facts    Facts              `json:"facts"`
	Sequence livepatch.Sequence `json:"sequence"` // loaded now; 0 for none
	State    State              `json:"state"`
}

// CheckAnswer is the server's answer to a check.
type CheckAnswer = fleet.Answer

// Offer is a target of the TUF repository.
type Offer = fleet.Offer

// Phase is where a machine is on its journey (docs: ARCHITECTURE.md).
type Phase string

// The phases, stored and sent as these words.
const (
	Idle          Phase = "idle"
	Staged        Phase = "staged"
	Loading       Phase = "loading"
	Transitioning Phase = "transitioning"
	Stalled       Phase = "stalled"
	Soaking       Phase = "soaking"
	Confirmed     Phase = "confirmed"
	Suspect       Phase = "suspect"
	Failed        Phase = "failed"
)

// State is one machine's state: one word with one reason and one next step,
// and every raw axis beside it.
type State struct {
	State    string             `json:"state"`  // see docs/reference/states.md
	Reason   fault.Code         `json:"reason"` // why, stable
	Text     string             `json:"text"`   // the reason for a person
	NextStep string             `json:"next_step"`
	Class    string             `json:"class,omitempty"` // of a refusal: stay, quarantine or halt
	Step     string             `json:"step,omitempty"`  // of the order in which the machine checks; docs/explanation/trust-on-the-machine.md
	Phase    Phase              `json:"phase"`
	Sequence livepatch.Sequence `json:"sequence"` // loaded and enabled now; 0 for none
	Highest  livepatch.Sequence `json:"highest"`  // highest ever confirmed on this kernel build
	Fixes    []livepatch.Fix    `json:"fixes"`    // fixed live, from the manifest of what is loaded
	Advice   string             `json:"reboot_advice"`
	Reasons  []fault.Code       `json:"reboot_reasons"`
	Notice   *Notice            `json:"notice,omitempty"` // absent: nothing is known, which is not "fine"
	Seen     *Seen              `json:"seen,omitempty"`   // absent: no metadata was accepted yet
}

// Seen is the newest signed state that a machine has accepted. Machines that
// lag behind the others are being kept back; two checkpoints of one log that
// are of one size and have two roots are two histories.
type Seen struct {
	Patches *Versions    `json:"patches,omitempty"`
	Rollout *Versions    `json:"rollout,omitempty"`
	Logs    []Checkpoint `json:"logs,omitempty"` // the largest of each log
}

// MaxSeenLogs limits the logs of a Seen.
const MaxSeenLogs = 4

// Versions are those of a repository's metadata.
type Versions struct {
	Root      int64 `json:"root"`
	Timestamp int64 `json:"timestamp"`
	Snapshot  int64 `json:"snapshot"`
	Targets   int64 `json:"targets"`
}

// Checkpoint is how large a log was, and its root then.
type Checkpoint struct {
	Log  string `json:"log"` // origin
	Size int64  `json:"size"`
	Root string `json:"root"` // base64
}

// Notice is the short of what the publisher told of the running kernel build.
type Notice struct {
	Support string         `json:"support"`           // supported, ending, ended or unknown
	Until   string         `json:"until,omitempty"`   // last day, as 2027-06-30
	Ended   string         `json:"ended,omitempty"`   // day on which it was declared dead
	Instead kernel.Release `json:"instead,omitempty"` // what to run
	Reboots int            `json:"reboots"`           // CVEs that only an update and a reboot fix
	CVEs    []cve.ID       `json:"cves,omitempty"`    // the first MaxNoticeCVEs of them
}

// MaxNoticeCVEs limits the list of a Notice.
const MaxNoticeCVEs = 500

// Event is a step on the journey that the server is told of.
type Event string

// The events, one for each step that is reported.
const (
	EventEnrolled  Event = "enrolled"
	EventStaged    Event = "staged"
	EventLoading   Event = "loading"
	EventLoaded    Event = "loaded"
	EventConfirmed Event = "confirmed"
	EventStalled   Event = "stalled"
	EventSuspect   Event = "suspect"
	EventFailed    Event = "failed"
	EventBooted    Event = "booted" // first contact after a boot
	EventRefused   Event = "refused"
)

// Report is sent at least once; Key makes the second time harmless.
type Report struct {
	Key      string             `json:"key"` // random, unique per report of a machine
	Event    Event              `json:"event"`
	At       time.Time          `json:"at"`
	BootID   string             `json:"boot_id"`
	Sequence livepatch.Sequence `json:"sequence"` // the livepatch concerned; 0 for none
	Code     fault.Code         `json:"code,omitempty"`
	Text     string             `json:"text,omitempty"`
	Took     int64              `json:"took_ms,omitempty"` // transition time, milliseconds
	Fixes    []cve.ID           `json:"fixes,omitempty"`
	Stall    []stall.Count      `json:"stall,omitempty"`   // of EventStalled: who was in the way, without names
	Tracers  []tracer.Tracer    `json:"tracers,omitempty"` // of EventLoading and EventRefused: found before loading
	State    State              `json:"state"`
	Facts    Facts              `json:"facts"`
}

// Problem is an error answer (RFC 9457): type is the fault kind.
type Problem struct {
	Type   fault.Kind `json:"type"`
	Title  string     `json:"title"`
	Status int        `json:"status"`
	Code   fault.Code `json:"code,omitempty"`
	Hint   string     `json:"hint,omitempty"`
}
