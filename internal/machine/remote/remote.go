// SPDX-License-Identifier: Apache-2.0

// Package remote is the server as a machine sees it: enroll, check, report
// over TLS in the words of package wire, and the publisher's signed metadata
// from the same place. It owns the machine's credential, one file that is
// replaced whole. What the server says is never trusted here: the agent
// verifies livepatches by itself.
package remote

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/machine/agent"
	"klatch/internal/pki"
	"klatch/internal/wire"
	"klatch/internal/wirecall"
)

// Client speaks to the server of the enrollment. Safe for concurrent use.
type Client struct {
	path string // of the credential
	log  *slog.Logger

	mu   sync.Mutex
	cred *credential // nil: not enrolled
	cert *tls.Certificate
	http *http.Client
}

// credential is the file identity.json, mode 0600. The key is secret.
type credential struct {
	Format      string `json:"format"`
	Server      string `json:"server"`
	MachineID   string `json:"machine_id"`
	Tier        string `json:"tier"`
	Certificate []byte `json:"certificate"` // X.509 in DER
	CA          []byte `json:"ca"`          // X.509 in DER
	Key         []byte `json:"key"`         // PEM
}

// LogValue keeps the key out of logs.
func (c credential) LogValue() slog.Value { return slog.StringValue(c.MachineID) }

const (
	credentialFormat = "klatch-identity/1"
	credentialFile   = "identity.json"
)

// Open reads the credential in dir, if there is one.
func Open(dir string, log *slog.Logger) (*Client, error) {
	c := &Client{path: filepath.Join(dir, credentialFile), log: log}
	b, err := durable.ReadFile(c.path, wire.MaxBody)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, err
	}
	var cred credential
	// The cause is left out: it may quote what it could not read.
	if json.Unmarshal(b, &cred) != nil || cred.Format != credentialFormat || c.use(cred) != nil {
		return nil, fault.New(fault.Internal, "identity_malformed", "read %s: not a credential of this machine", c.path).
			WithHint("remove the file, restart klatchd and enroll with a fresh token")
	}
	return c, nil
}

// use makes a credential the one in force. The caller holds the lock, or is
// the only one.
func (c *Client) use(cred credential) error {
	cert, err := pki.LoadMachine(cred.Certificate, cred.Key)
	if err != nil {
		return err
	}
	if c.http == nil || !bytes.Equal(c.cred.CA, cred.CA) {
		cfg, err := pki.TLSForMachine(cred.CA, c.certificate)
		if err != nil {
			return err
		}
		c.http = newClient(cfg)
	}
	c.cred, c.cert = &cred, &cert
	return nil
}

func newClient(cfg *tls.Config) *http.Client {
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSClientConfig: cfg, ForceAttemptHTTP2: true,
		// A machine speaks once an hour: nothing is kept open for long.
		MaxIdleConnsPerHost: 1, IdleConnTimeout: 10 * time.Second,
		TLSHandshakeTimeout: 15 * time.Second, ResponseHeaderTimeout: wirecall.Limit,
	}
	return &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse // a redirect could lead a credential away
	}}
}

func (c *Client) certificate() (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cert, nil
}

// Identity is who this machine is.
func (c *Client) Identity() (agent.Identity, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cred == nil {
		return agent.Identity{}, false
	}
	return c.cred.identity(c.cert.Leaf), true
}

func (c credential) identity(leaf *x509.Certificate) agent.Identity {
	return agent.Identity{MachineID: c.MachineID, Tier: c.Tier, Server: c.Server, Expires: leaf.NotAfter.UTC()}
}

// Address checks a server's address: https, a host, perhaps a port.
func Address(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		return nil, fault.New(fault.Invalid, "bad_server", "%.200q is not the address of a server", s).
			WithHint("write it as https://klatch.example.org:8443")
	}
	u.Path = ""
	return u, nil
}

// Enroll exchanges a token for a credential. The token names the server's CA,
// so it is said to no other server. On return the credential is on disk.
func (c *Client) Enroll(ctx context.Context, address string, token wire.Token, f wire.Facts) (agent.Identity, error) {
	var none agent.Identity
	u, err := Address(address)
	if err != nil {
		return none, err
	}
	cfg, err := pki.TLSForToken(token, u.Hostname())
	if err != nil {
		return none, err
	}
	key, csr, err := c.enrollKey()
	if err != nil {
		return none, err
	}
	client := newClient(cfg)
	defer client.CloseIdleConnections()
	var answer wire.EnrollAnswer
	if err := calls(client).Post(ctx, u.String()+"/v1/enroll", wire.EnrollRequest{Token: token, CSR: csr, Facts: f}, &answer); err != nil {
		return none, err
	}
	cred := credential{
		Format: credentialFormat, Server: u.String(), MachineID: answer.MachineID, Tier: answer.Tier,
		Certificate: answer.Certificate, CA: answer.CA, Key: key,
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.keep(cred); err != nil {
		return none, err
	}
	return cred.identity(c.cert.Leaf), durable.Remove(c.pendingPath())
}

func (c *Client) pendingPath() string { return c.path + ".enrolling" }

// enrollKey is the key to enroll with. It is on disk before the server hears
// of it: if the answer is lost, the next try shows the same key, and the
// server knows that it is no second machine with a used token.
func (c *Client) enrollKey() (key, csr []byte, err error) {
	key, err = durable.ReadFile(c.pendingPath(), wire.MaxBody)
	if err == nil {
		if csr, err = pki.MachineRequest(key); err == nil {
			return key, csr, nil
		}
	}
	if key, csr, err = pki.NewMachineKey(); err != nil {
		return nil, nil, err
	}
	return key, csr, durable.WriteFile(c.pendingPath(), key, 0o600)
}

// keep writes a credential and takes it into use. The caller holds the lock.
func (c *Client) keep(cred credential) error {
	if _, err := pki.LoadMachine(cred.Certificate, cred.Key); err != nil {
		return err
	}
	b, err := json.Marshal(cred)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(c.path, append(b, '\n'), 0o600); err != nil {
		return err
	}
	return c.use(cred)
}

// Check asks for an offer, and renews the certificate when its time has come.
func (c *Client) Check(ctx context.Context, r wire.CheckRequest) (wire.CheckAnswer, error) {
	var answer wire.CheckAnswer
	if err := c.renew(ctx); err != nil {
		// The old certificate may still do; if not, the check says so.
		c.log.LogAttrs(ctx, slog.LevelWarn, "certificate not renewed", slog.String("err", err.Error()))
	}
	return answer, c.call(ctx, "/v1/check", r, &answer)
}

// renew gets a new key certified at two thirds of the certificate's life. Key
// and certificate are one file, so a crash leaves either pair.
func (c *Client) renew(ctx context.Context) error {
	c.mu.Lock()
	if c.cred == nil {
		c.mu.Unlock()
		return nil
	}
	leaf := c.cert.Leaf
	c.mu.Unlock()
	if time.Now().Before(leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 3 * 2)) {
		return nil
	}
	key, csr, err := pki.NewMachineKey()
	if err != nil {
		return err
	}
	var answer wire.RenewAnswer
	if err := c.call(ctx, "/v1/renew", wire.RenewRequest{CSR: csr}, &answer); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	next := *c.cred
	next.Certificate, next.Key = answer.Certificate, key
	return c.keep(next)
}

// Report delivers a report; the server has it when this returns nil.
func (c *Client) Report(ctx context.Context, r wire.Report) error {
	return c.call(ctx, "/v1/reports", r, nil)
}

func (c *Client) call(ctx context.Context, path string, in, out any) error {
	base, client, err := c.connection()
	if err != nil {
		return err
	}
	return calls(client).Post(ctx, base+path, in, out)
}

func calls(client *http.Client) wirecall.Caller {
	return wirecall.Caller{HTTP: client, Again: "enroll again"}
}

func (c *Client) connection() (base string, client *http.Client, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cred == nil {
		return "", nil, fault.New(fault.NotFound, "not_enrolled", "this machine is not enrolled").
			WithHint("get a token from whoever runs the server: klatch enroll --server URL")
	}
	return c.cred.Server, c.http, nil
}
