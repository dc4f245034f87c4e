// SPDX-License-Identifier: Apache-2.0

package tufclient

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	tufconfig "github.com/theupdateframework/go-tuf/v2/metadata/config"
	"github.com/theupdateframework/go-tuf/v2/metadata/updater"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// Conformance is one look as the TUF conformance suite asks for it: with the
// fetcher, the verification, the limits and the synced files of Refresh, but
// following delegations of any shape, which Refresh refuses, and without a
// memory of the time. Tests only.
type Conformance struct {
	MetadataDir, MetadataURL string
	Target                   string // "" only refreshes
	TargetDir, TargetURL     string
	Now                      time.Time
}

// Run does it. What was verified before an error is kept.
func (c Conformance) Run(ctx context.Context) error {
	staging, err := os.MkdirTemp("", "klatch-conformance-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(staging) //nolint:errcheck // scratch
	if err := copyJSON(c.MetadataDir, staging, func(name string, b []byte, mode fs.FileMode) error {
		return os.WriteFile(name, b, mode) //nolint:forbidigo // scratch
	}); err != nil {
		return err
	}
	return errors.Join(c.look(ctx, staging), copyJSON(staging, c.MetadataDir, func(name string, b []byte, mode fs.FileMode) error {
		if err := checkForm(c.MetadataDir, filepath.Base(name), b); err != nil {
			return err
		}
		return durable.WriteFile(name, b, mode)
	}))
}

func (c Conformance) look(ctx context.Context, staging string) error {
	root, err := durable.ReadFile(filepath.Join(staging, "root.json"), maxState)
	if err != nil {
		return err
	}
	cfg, err := tufconfig.New(strings.TrimSuffix(c.MetadataURL, "/"), root)
	if err != nil {
		return fault.New(fault.Invalid, "bad_url", "repository address: %w", err)
	}
	cfg.LocalMetadataDir, cfg.LocalTargetsDir = staging, staging
	cfg.Fetcher = &fetcher{ctx: ctx, client: &http.Client{}, roots: map[string][]byte{}}
	u, err := updater.New(cfg)
	if err != nil {
		return explain(err)
	}
	u.UnsafeSetRefTime(c.Now)
	if err := u.Refresh(); err != nil || c.Target == "" {
		return explainIf(err)
	}
	info, err := u.GetTargetInfo(c.Target)
	if err != nil {
		return explain(err)
	}
	name := filepath.Join(c.TargetDir, url.PathEscape(c.Target))
	if path, _, err := u.FindCachedTarget(info, name); err == nil && path != "" {
		return nil
	}
	info.Path = (&url.URL{Path: c.Target}).EscapedPath() // go-tuf joins addresses as text
	_, b, err := u.DownloadTarget(info, filepath.Join(staging, "target"), c.TargetURL)
	if err != nil {
		return explain(err)
	}
	return durable.WriteFile(name, b, 0o600)
}

func explainIf(err error) error {
	if err == nil {
		return nil
	}
	return explain(err)
}

// copyJSON copies metadata files, the top roles first and in their order.
func copyJSON(from, to string, write func(string, []byte, fs.FileMode) error) error {
	names, err := filepath.Glob(filepath.Join(from, "*.json"))
	if err != nil {
		return err
	}
	rank := func(n string) int {
		if i := slices.Index(files, filepath.Base(n)); i >= 0 {
			return i
		}
		return len(files)
	}
	slices.SortStableFunc(names, func(a, b string) int { return cmp.Compare(rank(a), rank(b)) })
	for _, n := range names {
		b, err := durable.ReadFile(n, maxState)
		if err != nil {
			return err
		}
		if err := write(filepath.Join(to, filepath.Base(n)), b, 0o600); err != nil {
			return err
		}
	}
	return nil
}
