// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/pki"
	"klatch/internal/server/repo"
	"klatch/internal/trust"
)

// The data folder. All but klatch.db and repository/ must be kept to stay the
// same server; those two are filled again from outside.
const (
	settingsFile = "server.json"
	caCertFile   = "ca.crt"
	caKeyFile    = "ca.key"
	certFile     = "server.crt"
	keyFile      = "server.key"
	anchorFile   = "anchor.json"
	databaseFile = "klatch.db"
	copyDir      = "repository"
	memoryDir    = "upstream" // newest metadata ever accepted from the publisher

	settingsFormat = "klatch-server/1"
	maxSettings    = 1 << 20
)

// settings is the file that init writes last: with it the folder is complete.
type settings struct {
	Format      string   `json:"format"`
	Names       []string `json:"names"`
	AdminDigest string   `json:"admin_digest"` // SHA-256 of the admin token, hexadecimal
	AllowLab    bool     `json:"allow_lab"`
	Upstream    string   `json:"upstream"`

	// Filter, MinAge and Interval are of the copy; see configure.
	Filter   repo.Filter `json:"filter,omitzero"`
	MinAge   duration    `json:"min_age,omitzero"`
	Interval duration    `json:"sync_interval,omitzero"`

	// Storage is where the copy lies: an s3:// address or a folder; empty: the
	// folder repository of the data folder.
	Storage string `json:"storage,omitempty"`

	// Closed keeps the repository for machines and mirrors of this server.
	Closed bool `json:"closed,omitempty"`

	// Rollout says whose tiers there are: local, of an operator's repository
	// of this server if it has one, or upstream.
	Rollout string `json:"rollout,omitempty"`
}

// rules are what the owner wants copied.
func (s settings) rules() repo.Rules {
	return repo.Rules{Filter: s.Filter, MinAge: time.Duration(s.MinAge)}
}

// duration is a time span that a person can read in a file.
type duration time.Duration

func (d duration) MarshalText() ([]byte, error) { //nolint:unparam // of encoding.TextMarshaler
	return []byte(time.Duration(d).String()), nil
}

func (d *duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = duration(v)
	return err
}

// data is an open data folder.
type data struct {
	dir string
	settings
	ca     *pki.CA
	anchor *trust.Anchor
}

func (d *data) path(name string) string { return filepath.Join(d.dir, name) }

func openData(dir string) (*data, error) {
	d := &data{dir: dir}
	var err error
	if d.settings, err = readSettings(dir); err != nil {
		return nil, err
	}
	if d.ca, err = loadCA(dir); err != nil {
		return nil, err
	}
	if d.anchor, err = loadAnchor(d.path(anchorFile), d.AllowLab); err != nil {
		return nil, err
	}
	return d, nil
}

func readSettings(dir string) (settings, error) {
	var s settings
	name := filepath.Join(dir, settingsFile)
	b, err := durable.ReadFile(name, maxSettings)
	if errors.Is(err, fs.ErrNotExist) {
		return s, fault.New(fault.NotFound, "not_initialized", "%s holds no server", dir).
			WithHint("make one: klatch-server init --data %s --name NAME --anchor FILE", dir)
	}
	if err != nil {
		return s, err
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil || s.Format != settingsFormat {
		return s, fault.New(fault.Invalid, "settings_malformed", "read %s: not settings of format %s: %w", name, settingsFormat, err)
	}
	return s, errors.Join(s.rules().Validate(), s.checkRollout())
}

func writeSettings(dir string, s settings) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, settingsFile), append(b, '\n'), 0o600)
}

func loadCA(dir string) (*pki.CA, error) {
	cert, err := durable.ReadFile(filepath.Join(dir, caCertFile), maxSettings)
	if err != nil {
		return nil, err
	}
	key, err := durable.ReadFile(filepath.Join(dir, caKeyFile), maxSettings)
	if err != nil {
		return nil, err
	}
	return pki.LoadCA(cert, key)
}

func loadAnchor(path string, allowLab bool) (*trust.Anchor, error) {
	b, err := durable.ReadFile(path, trust.MaxAnchor)
	if err != nil {
		return nil, err
	}
	a, err := trust.ParseAnchor(b, allowLab)
	if fault.CodeOf(err) == "lab_keys" {
		return nil, fault.New(fault.Untrusted, "lab_keys", "%w", err).
			WithHint("use an anchor of profile small, or accept lab keys on this server: --allow-lab")
	}
	return a, err
}

// repo opens the copy where the settings say it lies.
func (d *data) repo(ctx context.Context, log *slog.Logger) (*repo.Repo, error) {
	files, err := openStorage(ctx, d.dir, d.Storage)
	if err != nil {
		return nil, err
	}
	return repo.New(files, d.path(memoryDir), d.anchor, log), nil
}

// certificate is the server's own, renewed when a third of its life is left.
type certificate struct {
	d   *data
	log *slog.Logger
	mu  sync.Mutex
	now *tls.Certificate
}

// get is for tls.Config.GetCertificate.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if c.now == nil {
		cert, err := tls.LoadX509KeyPair(c.d.path(certFile), c.d.path(keyFile))
		if err == nil && cert.Leaf == nil {
			cert.Leaf, err = x509.ParseCertificate(cert.Certificate[0])
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if err == nil {
			c.now = &cert
		}
	}
	if c.now != nil && now.Before(c.now.Leaf.NotAfter.Add(-pki.ServerLife/3)) {
		return c.now, nil
	}
	certPEM, keyPEM, err := c.d.ca.SignServer(c.d.Names, now)
	if err != nil {
		return nil, err
	}
	if err := writeCertificate(c.d.dir, certPEM, keyPEM); err != nil {
		return nil, err
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, err
	}
	c.now = &cert
	c.log.Info("server certificate renewed", slog.Time("expires", cert.Leaf.NotAfter))
	return c.now, nil
}

// writeCertificate removes the old key first: a crash in between leaves none,
// and a missing pair is made anew, a mismatched one would not be.
func writeCertificate(dir string, certPEM, keyPEM []byte) error {
	for _, name := range []string{keyFile, certFile} {
		if err := durable.Remove(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := durable.WriteFile(filepath.Join(dir, certFile), certPEM, 0o644); err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, keyFile), keyPEM, 0o600)
}

func digest(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// makeDir makes the data folder for nobody else.
func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make data folder: %w", err)
	}
	return nil
}
