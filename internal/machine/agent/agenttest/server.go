// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"context"
	"slices"
	"sync"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/wire"
)

// Server is the fleet's server in memory.
type Server struct {
	mu       sync.Mutex
	identity *agent.Identity
	checks   []time.Time
	requests []wire.CheckRequest
	reports  []wire.Report

	// Offer is the answer to checks; nil offers nothing.
	Offer  *wire.Offer
	Reason string
	// Insist offers it also to a machine that has it.
	Insist bool
	// Fail is the answer to checks and reports; nil serves.
	Fail error
	// Twice loses the answer to each report once, after taking it.
	Twice bool
	lost  map[string]bool
}

// MachineID is the name of the one machine.
const MachineID = "mch_01hzzzzzzzzzzzzzzzzzzzzzzz"

// NewServer makes a server that knows this machine already.
func NewServer() *Server {
	return &Server{Reason: "current", lost: map[string]bool{}, identity: &agent.Identity{MachineID: MachineID, Tier: "stable", Server: "https://server"}}
}

// Set changes the server under its lock.
func (s *Server) Set(f func(*Server)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s)
}

// OfferTarget offers a livepatch from now on.
func (s *Server) OfferTarget(target string, n livepatch.Sequence) {
	s.Set(func(s *Server) { s.Offer, s.Reason = &wire.Offer{Target: target, Sequence: n}, "newest" })
}

// Forget makes the machine an unenrolled one.
func (s *Server) Forget() { s.Set(func(s *Server) { s.identity = nil }) }

// Identity is who the machine is.
func (s *Server) Identity() (agent.Identity, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.identity == nil {
		return agent.Identity{}, false
	}
	return *s.identity, true
}

// Enroll takes the token "good".
func (s *Server) Enroll(_ context.Context, address string, token wire.Token, _ wire.Facts) (agent.Identity, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if token != "good" {
		return agent.Identity{}, fault.New(fault.Denied, "token_unknown", "server: token is not known").WithHint("ask for a new one")
	}
	s.identity = &agent.Identity{MachineID: MachineID, Tier: "stable", Server: address}
	return *s.identity, nil
}

// Check answers with the offer of the moment, unless the machine has it.
func (s *Server) Check(_ context.Context, r wire.CheckRequest) (wire.CheckAnswer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.identity == nil {
		return wire.CheckAnswer{}, fault.New(fault.NotFound, "not_enrolled", "this machine is not enrolled")
	}
	s.checks = append(s.checks, time.Now())
	s.requests = append(s.requests, r)
	if s.Fail != nil {
		return wire.CheckAnswer{}, s.Fail
	}
	if s.Offer != nil && s.Offer.Sequence == r.Sequence && !s.Insist {
		return wire.CheckAnswer{Reason: "current"}, nil
	}
	return wire.CheckAnswer{Offer: s.Offer, Reason: s.Reason}, nil
}

// Report keeps a report; one with a known key changes nothing.
func (s *Server) Report(_ context.Context, r wire.Report) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.Fail != nil {
		return s.Fail
	}
	if !slices.ContainsFunc(s.reports, func(old wire.Report) bool { return old.Key == r.Key }) {
		s.reports = append(s.reports, r)
	}
	if s.Twice && !s.lost[r.Key] {
		s.lost[r.Key] = true
		return fault.New(fault.Unavailable, "server_unavailable", "the answer was lost")
	}
	return nil
}

// Checks are the times of all checks.
func (s *Server) Checks() []time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.checks)
}

// Reports are the reports in the order of their arrival.
func (s *Server) Reports() []wire.Report {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.reports)
}

// Events are the reports' events.
func (s *Server) Events() []wire.Event {
	var events []wire.Event
	for _, r := range s.Reports() {
		events = append(events, r.Event)
	}
	return events
}

// Requests are all checks as they were asked.
func (s *Server) Requests() []wire.CheckRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}
