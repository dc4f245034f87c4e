// SPDX-License-Identifier: Apache-2.0

// Package upstream is the klatch-server above, as a mirror sees it: join with
// a token, and read the repository with the certificate that the token gave.
// It owns the mirror's credential, one file that is replaced whole. What comes
// from there is not believed: package repo verifies it. Start with Join.
package upstream

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/pki"
	"klatch/internal/wire"
	"klatch/internal/wirecall"
)

// Client reads from the server that the mirror joined.
type Client struct {
	path string
	cred credential
	cert tls.Certificate
	http *http.Client
}

// credential is the file, mode 0600. The key is secret.
type credential struct {
	Format      string `json:"format"`
	Server      string `json:"server"`
	MirrorID    string `json:"mirror_id"`
	Certificate []byte `json:"certificate"` // X.509 in DER
	CA          []byte `json:"ca"`          // X.509 in DER
	Key         []byte `json:"key"`         // PEM
}

// LogValue keeps the key out of logs.
func (c credential) LogValue() slog.Value { return slog.StringValue(c.MirrorID) }

const (
	credentialFormat = "klatch-mirror-identity/1" //nolint:gosec // a version word
)

// Address checks how a person wrote a server's address.
func Address(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		return nil, fault.New(fault.Invalid, "bad_server", "%.200q is not the address of a server", s).
			WithHint("write it as https://klatch.example.org:8443")
	}
	u.Path = ""
	return u, nil
}

// Join exchanges a token for a credential, which is on disk when it returns.
// The token names the server's CA, so it is said to no other server. The key is
// on disk before: a lost answer is asked for again with the same one.
func Join(ctx context.Context, path, address string, token wire.Token, name string) (*Client, error) {
	u, err := Address(address)
	if err != nil {
		return nil, err
	}
	cfg, err := pki.TLSForToken(token, u.Hostname())
	if err != nil {
		return nil, err
	}
	pending := path + ".joining"
	key, csr, err := pendingKey(pending)
	if err != nil {
		return nil, err
	}
	client := newClient(cfg)
	defer client.CloseIdleConnections()
	var a wire.JoinAnswer
	if err := calls(client).Post(ctx, u.String()+"/v1/join", wire.JoinRequest{Token: token, CSR: csr, Name: name}, &a); err != nil {
		return nil, err
	}
	c := &Client{path: path}
	err = c.keep(credential{Format: credentialFormat, Server: u.String(), MirrorID: a.MirrorID, Certificate: a.Certificate, CA: a.CA, Key: key})
	if err != nil {
		return nil, err
	}
	return c, durable.Remove(pending)
}

func pendingKey(path string) (key, csr []byte, err error) {
	if key, err = durable.ReadFile(path, wire.MaxBody); err == nil {
		if csr, err = pki.MachineRequest(key); err == nil {
			return key, csr, nil
		}
	}
	if key, csr, err = pki.NewMachineKey(); err != nil {
		return nil, nil, err
	}
	return key, csr, durable.WriteFile(path, key, 0o600)
}

// Open reads the credential; nil without an error if there is none.
func Open(path string) (*Client, error) {
	b, err := durable.ReadFile(path, wire.MaxBody)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	c := &Client{path: path}
	var cred credential
	// The cause is left out: it may quote what it could not read.
	if json.Unmarshal(b, &cred) != nil || cred.Format != credentialFormat || c.use(cred) != nil {
		return nil, fault.New(fault.Internal, "identity_malformed", "read %s: not the credential of a mirror", path).
			WithHint("remove the file and join again with a fresh token: klatch-server join")
	}
	return c, nil
}

// Server is the address, as Join was told.
func (c *Client) Server() string { return c.cred.Server }

// MirrorID is what the server above calls this mirror.
func (c *Client) MirrorID() string { return c.cred.MirrorID }

// Expires is when the certificate does.
func (c *Client) Expires() time.Time { return c.cert.Leaf.NotAfter }

// Serves says whether an address is of this server.
func (c *Client) Serves(address string) bool {
	u, err := Address(address)
	return err == nil && u.String() == c.cred.Server
}

// HTTP gives the client to read with, for one round: it renews the certificate
// first when two thirds of its life are over. If that does not work the old
// one may still do; if not, reading says so.
func (c *Client) HTTP(ctx context.Context, now time.Time) (*http.Client, error) {
	life := c.cert.Leaf.NotAfter.Sub(c.cert.Leaf.NotBefore)
	if now.Before(c.cert.Leaf.NotBefore.Add(life / 3 * 2)) {
		return c.http, nil
	}
	return c.http, c.renew(ctx)
}

func (c *Client) renew(ctx context.Context) error {
	key, csr, err := pki.NewMachineKey()
	if err != nil {
		return err
	}
	var a wire.RenewAnswer
	if err := calls(c.http).Post(ctx, c.cred.Server+"/v1/join/renew", wire.RenewRequest{CSR: csr}, &a); err != nil {
		return err
	}
	c.http.CloseIdleConnections()
	next := c.cred
	next.Certificate, next.Key = a.Certificate, key
	return c.keep(next)
}

// keep writes a credential and takes it into use.
func (c *Client) keep(cred credential) error {
	if err := c.use(cred); err != nil {
		return err
	}
	b, err := json.Marshal(cred)
	if err != nil {
		return err
	}
	return durable.WriteFile(c.path, append(b, '\n'), 0o600)
}

func (c *Client) use(cred credential) error {
	cert, err := pki.LoadMachine(cred.Certificate, cred.Key)
	if err != nil {
		return err
	}
	if c.http == nil {
		cfg, err := pki.TLSForMachine(cred.CA, func() (*tls.Certificate, error) { return &c.cert, nil })
		if err != nil {
			return err
		}
		c.http = newClient(cfg)
	}
	c.cred, c.cert = cred, cert
	return nil
}

// newClient speaks to one server. It follows no redirect: nobody but that
// server shall see our certificate, and it has no reason to send us elsewhere.
func newClient(cfg *tls.Config) *http.Client {
	t := &http.Transport{
		TLSClientConfig: cfg, Proxy: http.ProxyFromEnvironment, TLSHandshakeTimeout: 20 * time.Second,
		ResponseHeaderTimeout: time.Minute, IdleConnTimeout: time.Minute,
	}
	return &http.Client{
		Transport:     refusals{t},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// refusals turns the server's "you may not" into its own words: a reader of
// files would only say that a file cannot be had.
type refusals struct{ next *http.Transport }

func (r refusals) RoundTrip(q *http.Request) (*http.Response, error) {
	a, err := r.next.RoundTrip(q)
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return nil, calls(nil).Explain(q.URL.Host, err)
	}
	if err != nil || a.StatusCode != http.StatusForbidden {
		return a, err
	}
	defer a.Body.Close() //nolint:errcheck // read only
	b, err := durable.ReadLimited(a.Body, q.URL.String(), wire.MaxBody)
	if err != nil {
		return nil, err
	}
	return nil, wirecall.Problem(q.URL.Host, a.StatusCode, b)
}

// CloseIdleConnections is for http.Client.
func (r refusals) CloseIdleConnections() { r.next.CloseIdleConnections() }

func calls(client *http.Client) wirecall.Caller {
	return wirecall.Caller{HTTP: client, Again: "join again"}
}
