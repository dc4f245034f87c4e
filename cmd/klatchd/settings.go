// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"klatch/internal/conf"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/remote"
	"klatch/internal/rollout"
	"klatch/internal/trust"
)

// written is the configuration as people write it. The comments are the
// reference in docs/reference/machine.md.
type written struct {
	// How often the server is asked, a tenth more or less; "0" asks only on
	// demand. At least 5s.
	CheckInterval *conf.Duration `toml:"check_interval"`
	// How long a transition may take before it is canceled. At least 5s.
	TransitionDeadline *conf.Duration `toml:"transition_deadline"`
	// How long trouble counts against a livepatch before it is confirmed. At
	// least 1s.
	Soak *conf.Duration `toml:"soak"`
	// The first wait after a stalled transition; doubles up to 6h. At least 5s.
	StallRetry *conf.Duration `toml:"stall_retry"`
	// This machine's tier, where a rollout anchor is installed. The server is not
	// asked for it.
	Tier *string `toml:"tier"`
	// Of whom evidence is asked beside livepatches: published (of publishers that
	// have an evidence policy) or required (of all: without one nothing is loaded).
	Evidence *string `toml:"evidence"`
	// What goes to the journal: debug, info, warn or error.
	LogLevel *string `toml:"log_level"`
}

// settings is the configuration checked and complete.
type settings struct {
	policy agent.Policy
	tier   string
	proofs agent.EvidenceRule
	level  slog.Level
}

// readSettings also lists every key with its value in force and its origin.
func readSettings(root string) (settings, []conf.Setting, error) {
	var w written
	origins, err := conf.Read(conf.Folders(root), &w)
	if err != nil {
		return settings{}, nil, err
	}
	s := settings{policy: agent.DefaultPolicy()}
	for _, f := range []struct {
		key   string
		value **conf.Duration
		to    *time.Duration
		least time.Duration
		zero  bool // zero is allowed and means never
	}{
		{"check_interval", &w.CheckInterval, &s.policy.CheckInterval, 5 * time.Second, true},
		{"transition_deadline", &w.TransitionDeadline, &s.policy.Deadline, 5 * time.Second, false},
		{"soak", &w.Soak, &s.policy.Soak, time.Second, false},
		{"stall_retry", &w.StallRetry, &s.policy.StallRetry, 5 * time.Second, false},
	} {
		if *f.value == nil {
			d := conf.Duration{Duration: *f.to}
			*f.value = &d
			continue
		}
		d := (*f.value).Duration
		if d < f.least && (d != 0 || !f.zero) {
			return s, nil, fault.New(fault.Invalid, "config_invalid", "%s: %s is %s, at least %s is possible", origins.Of(f.key), f.key, d, f.least)
		}
		*f.to = d
	}
	if w.Tier == nil {
		w.Tier = new(string)
	}
	if s.tier = *w.Tier; s.tier != "" {
		if err := rollout.CheckTierName(s.tier); err != nil {
			return s, nil, fault.New(fault.Invalid, "config_invalid", "%s: %w", origins.Of("tier"), err)
		}
	}
	if w.Evidence == nil {
		rule := string(agent.EvidencePublished)
		w.Evidence = &rule
	}
	if s.proofs = agent.EvidenceRule(*w.Evidence); s.proofs != agent.EvidencePublished && s.proofs != agent.EvidenceRequired {
		return s, nil, fault.New(fault.Invalid, "config_invalid", "%s: evidence %.40q is not published or required", origins.Of("evidence"), *w.Evidence)
	}
	if w.LogLevel == nil {
		level := "info"
		w.LogLevel = &level
	}
	if err := s.level.UnmarshalText([]byte(*w.LogLevel)); err != nil {
		return s, nil, fault.New(fault.Invalid, "config_invalid", "%s: log_level %.40q is not debug, info, warn or error", origins.Of("log_level"), *w.LogLevel)
	}
	return s, conf.Settings(w, origins), nil
}

// readAnchor reads what the machine's owner trusts. The loader reads the same
// two files by itself.
func readAnchor(root string) (*trust.Anchor, error) {
	etc := filepath.Join(root, "etc/klatch")
	b, err := durable.ReadFile(filepath.Join(etc, "trust.json"), trust.MaxAnchor)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "no_anchor", "no trust anchor is installed").
			WithHint("install the one of your publisher: klatch trust install FILE")
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "anchor_unreadable", "read trust anchor: %w", err)
	}
	_, err = os.Lstat(filepath.Join(etc, "allow-lab-keys"))
	return trust.ParseAnchor(b, err == nil)
}

// readOperator reads whose rollout repository this machine follows; nil where
// no anchor is installed. The loader has no use for it.
func readOperator(root string) (*rollout.Anchor, error) {
	etc := filepath.Join(root, "etc/klatch")
	b, err := durable.ReadFile(filepath.Join(etc, "rollout.json"), rollout.MaxAnchor)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "anchor_unreadable", "read rollout anchor: %w", err)
	}
	_, err = os.Lstat(filepath.Join(etc, "allow-lab-keys"))
	return rollout.ParseAnchor(b, err == nil)
}

// remoteIn opens the credential below the state folder.
func remoteIn(p places, log *slog.Logger) (*remote.Client, error) {
	if err := os.MkdirAll(p.state, 0o700); err != nil {
		return nil, err
	}
	return remote.Open(p.state, log)
}
