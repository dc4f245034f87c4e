// SPDX-License-Identifier: Apache-2.0

// Package loaderapi is what klatchd and klatch-loader say to each other: the
// messages, their encoding on a Unix stream socket, and root's end of it. The
// client is in package loaderclient.
//
// It uses system calls instead of package net, so that the root program links
// no network code at all. One connection carries one request and one answer;
// each is a 4-byte big-endian length and JSON of at most MaxMessage bytes
// (MaxAnswer for an answer, which lists every fix of a cumulative livepatch).
// Files travel as descriptors beside the request (SCM_RIGHTS, unix(7)), never
// as paths.
package loaderapi

import (
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

// Limits of one message, in bytes. Root reads requests only; an answer holds
// the fixes of a manifest, which has livepatch.MaxManifest bytes at most.
const (
	MaxMessage = 64 << 10
	MaxAnswer  = 2 << 20
)

// SocketPath is where the loader listens; systemd owns the socket.
const SocketPath = "/run/klatch/loader.sock"

// Op names a request.
type Op string

// The eight requests. Boot is not one: it has its own unit and takes no input.
const (
	// OpLoad loads a livepatch. Two descriptors: the signed manifest, the
	// signed module. Answers when the kernel has taken the module; the
	// transition may still run.
	OpLoad Op = "load"
	// OpStatus tells what the loader knows. Changes nothing.
	OpStatus Op = "status"
	// OpConfirm asks to raise the highest confirmed sequence to that of the
	// loaded livepatch. The loader looks for itself (transition 0, enabled 1,
	// every loaded object patched) and may refuse with code "not_done".
	OpConfirm Op = "confirm"
	// OpCancel reverses a transition that has not finished.
	OpCancel Op = "cancel"
	// OpBlockers lists the tasks that keep a transition from finishing.
	OpBlockers Op = "blockers"
	// OpTracers tells who else is attached to functions of the kernel.
	OpTracers Op = "tracers"
	OpRecall  Op = "recall" // one descriptor: the publisher's newest signed recalls
	// OpDisable is the break-glass: take the livepatch out until the next
	// reboot. Only for uid 0.
	OpDisable Op = "disable"
)

// Request is one request. Sequence is the one meant by confirm and cancel, so
// that a late request never hits another livepatch.
type Request struct {
	Version  int                `json:"version"` // 1
	Op       Op                 `json:"op"`
	Sequence livepatch.Sequence `json:"sequence,omitempty"`
}

// Answer is one answer; Fault is null where the request was done.
type Answer struct {
	Version  int         `json:"version"`
	Fault    *fault.Wire `json:"fault"`
	Status   Status      `json:"status"` // after the request, also with a fault; zero for a caller who may not ask
	Blockers []Blocker   `json:"blockers,omitempty"`
	Tracers  string      `json:"tracers,omitempty"` // in the kernel's words, see package tracer
}

// Status is what the loader knows and sees.
type Status struct {
	Kernel   kernel.Build       `json:"kernel,omitzero"` // the running one; distro is empty, the kernel does not know it
	Loaded   *Loaded            `json:"loaded"`          // our livepatch in the kernel; null for none
	Foreign  []string           `json:"foreign"`         // livepatches in the kernel that are not ours
	Highest  livepatch.Sequence `json:"highest"`         // highest ever confirmed on this kernel build
	Attempt  *Attempt           `json:"attempt"`         // in flight; null for none
	Recalls  int64              `json:"recalls"`         // version that the loader has
	Disabled bool               `json:"disabled"`        // by root, until the next reboot
	Boot     BootState          `json:"boot"`
}

// Loaded is the state of our livepatch, as sysfs says it
// (Documentation/ABI/testing/sysfs-kernel-livepatch).
type Loaded struct {
	Sequence   livepatch.Sequence `json:"sequence"`
	Enabled    bool               `json:"enabled"`
	Transition bool               `json:"transition"`
	Patched    bool               `json:"patched"` // every object that is loaded
	// Manifest is known where the loader put the livepatch in itself and still
	// has it in its store.
	Fixes []livepatch.Fix `json:"fixes"`
}

// Attempt is a load that is not confirmed yet.
type Attempt struct {
	Sequence livepatch.Sequence `json:"sequence"`
	BootID   string             `json:"boot_id"`
	Boots    int                `json:"boots"` // boots that died with this attempt in flight
	AtBoot   bool               `json:"at_boot"`
}

// BootState says what happened, or will happen, at boot.
type BootState struct {
	// Outcome of this boot: "loaded", "nothing_stored", "wrong_build",
	// "off_parameter", "off_flag", "off_breaker", "failed", "not_run".
	Outcome string     `json:"outcome"`
	Code    fault.Code `json:"code"`
	Text    string     `json:"text"`
	// Stops lists what would stop loading at the next boot: "flag", "breaker".
	Stops []string `json:"stops"`
}

// Blocker is a task that keeps a transition from finishing; package stall reads it.
type Blocker = kernel.Blocker
