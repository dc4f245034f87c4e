// SPDX-License-Identifier: Apache-2.0

// Package pki is the server's small certificate authority and both ends of the
// TLS connections that it makes possible. A machine learns the CA's
// fingerprint with its enrollment token, so it knows the right server before
// it says the secret; afterwards it shows a short-lived certificate whose
// common name is its machine id. None of this says anything about livepatches:
// who owns the CA can name machines, and delay, never forge.
//
// TLS 1.3 only, ECDSA P-256 only, one CA without intermediates. Start with CA.
package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"regexp"
	"time"

	"klatch/internal/fault"
)

// Lives of certificates. A machine renews at two thirds of its week; the
// server's own is renewed by the server at start; the CA outlives both, and a
// new one means that every machine enrolls again.
const (
	CALife      = 10 * 365 * 24 * time.Hour
	ServerLife  = 90 * 24 * time.Hour
	MachineLife = 7 * 24 * time.Hour
	MirrorLife  = 30 * 24 * time.Hour // a mirror may be away for long; it can be removed at once

	// early is how far back a certificate is valid, for clocks that lag.
	early = 5 * time.Minute
)

// CA signs server and machine certificates.
type CA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA makes a CA with a fresh key.
func NewCA(name string, now time.Time) (*CA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t, err := template(name, now, CALife)
	if err != nil {
		return nil, err
	}
	t.IsCA, t.BasicConstraintsValid, t.MaxPathLenZero = true, true, true
	t.KeyUsage = x509.KeyUsageCertSign
	cert, err := issue(t, t, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	return &CA{cert, key}, nil
}

// LoadCA reads what Encode wrote.
func LoadCA(certPEM, keyPEM []byte) (*CA, error) {
	der, err := decodePEM(certPEM, "CERTIFICATE")
	if err != nil {
		return nil, fmt.Errorf("CA certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("CA certificate: %w", err)
	}
	key, err := loadKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("CA key: %w", err)
	}
	if !cert.IsCA || !key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("CA key and certificate do not belong together")
	}
	return &CA{cert, key}, nil
}

// Encode gives certificate and key in PEM. The key is secret.
func (c *CA) Encode() (certPEM, keyPEM []byte, err error) {
	keyPEM, err = encodeKey(c.key)
	return encodePEM("CERTIFICATE", c.cert.Raw), keyPEM, err
}

// Certificate is the CA's certificate in DER.
func (c *CA) Certificate() []byte { return c.cert.Raw }

// Fingerprint is the SHA-256 of the certificate, as tokens carry it.
func (c *CA) Fingerprint() Fingerprint { return sha256.Sum256(c.cert.Raw) }

// SignServer makes a key and a certificate for host names and addresses.
// certPEM holds the CA's certificate too, because a machine that enrolls has
// only its fingerprint.
func (c *CA) SignServer(names []string, now time.Time) (certPEM, keyPEM []byte, err error) {
	if len(names) == 0 {
		return nil, nil, fault.New(fault.Invalid, "no_name", "server certificate without a name").
			WithHint("say under which names or addresses machines reach the server: --name klatch.example.org")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	t, err := template(names[0], now, ServerLife)
	if err != nil {
		return nil, nil, err
	}
	t.KeyUsage, t.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for _, n := range names {
		ip := net.ParseIP(n)
		switch {
		case ip != nil:
			t.IPAddresses = append(t.IPAddresses, ip)
		case hostName.MatchString(n) && len(n) <= 253:
			t.DNSNames = append(t.DNSNames, n)
		default:
			return nil, nil, fault.New(fault.Invalid, "bad_name", "%.100q is neither a host name nor an address", n)
		}
	}
	cert, err := issue(t, c.cert, &key.PublicKey, c.key)
	if err != nil {
		return nil, nil, err
	}
	keyPEM, err = encodeKey(key)
	return append(encodePEM("CERTIFICATE", cert.Raw), encodePEM("CERTIFICATE", c.cert.Raw)...), keyPEM, err
}

var hostName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,62})(\.[a-z0-9]([a-z0-9-]{0,62}))*$`)

// Request is a checked request for a machine certificate.
type Request struct {
	key *ecdsa.PublicKey
	raw []byte
}

// ParseRequest checks a PKCS #10 request: signed by its own key, ECDSA P-256.
// Its subject and extensions are ignored; the server decides those.
func ParseRequest(der []byte) (Request, error) {
	bad := func(err error) (Request, error) {
		return Request{}, fault.New(fault.Invalid, "bad_csr", "certificate request: %w", err)
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return bad(err)
	}
	if err := r.CheckSignature(); err != nil {
		return bad(err)
	}
	key, ok := r.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return bad(errors.New("key is not ECDSA P-256"))
	}
	return Request{key, r.RawSubjectPublicKeyInfo}, nil
}

// KeyDigest names the key of a request, so that the same machine asking twice
// is recognized.
func (r Request) KeyDigest() [sha256.Size]byte { return sha256.Sum256(r.raw) }

// SignMachine makes the certificate of a machine.
func (c *CA) SignMachine(r Request, machineID string, now time.Time) (der []byte, expires time.Time, err error) {
	return c.signClient(r, machineID, machinePattern, MachineLife, now)
}

// SignMirror makes the certificate of a mirror below this server. It names no
// machine, so it cannot report as one.
func (c *CA) SignMirror(r Request, mirrorID string, now time.Time) (der []byte, expires time.Time, err error) {
	return c.signClient(r, mirrorID, mirrorPattern, MirrorLife, now)
}

func (c *CA) signClient(r Request, id string, pattern *regexp.Regexp, life time.Duration, now time.Time) (der []byte, expires time.Time, err error) {
	if !pattern.MatchString(id) {
		return nil, time.Time{}, fmt.Errorf("sign certificate: %.60q is not an id", id)
	}
	t, err := template(id, now, life)
	if err != nil {
		return nil, time.Time{}, err
	}
	t.KeyUsage, t.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	cert, err := issue(t, c.cert, r.key, c.key)
	if err != nil {
		return nil, time.Time{}, err
	}
	return cert.Raw, cert.NotAfter, nil
}

var (
	machinePattern = regexp.MustCompile(`^mch_[0-9a-z]{26}$`)
	mirrorPattern  = regexp.MustCompile(`^mir_[0-9a-z]{26}$`)
)

// VerifyMachine says which machine is at the other end of a connection. The
// handshake has proved that it holds the key; whether we signed the
// certificate is checked here and not in the handshake, so that the machine
// gets a reason instead of a TLS alert.
func (c *CA) VerifyMachine(state *tls.ConnectionState, now time.Time) (machineID string, err error) {
	return c.verifyClient(state, now, "machine", machinePattern, "enroll this machine with a fresh token: klatch enroll")
}

// VerifyMirror is VerifyMachine for a mirror.
func (c *CA) VerifyMirror(state *tls.ConnectionState, now time.Time) (mirrorID string, err error) {
	return c.verifyClient(state, now, "mirror", mirrorPattern, "join again with a fresh token of the server above: klatch-server join")
}

// SaysMirror tells whether the certificate that was shown claims to be a
// mirror's. Nothing about it is verified.
func SaysMirror(state *tls.ConnectionState) bool {
	return state != nil && len(state.PeerCertificates) > 0 && mirrorPattern.MatchString(state.PeerCertificates[0].Subject.CommonName)
}

func (c *CA) verifyClient(state *tls.ConnectionState, now time.Time, who string, pattern *regexp.Regexp, hint string) (id string, err error) {
	denied := func(code fault.Code, format string, args ...any) (string, error) {
		return "", fault.New(fault.Denied, code, format, args...).WithHint("%s", hint)
	}
	if state == nil || len(state.PeerCertificates) == 0 {
		return denied("certificate_missing", "no certificate of a %s was shown", who)
	}
	cert := state.PeerCertificates[0]
	pool := x509.NewCertPool()
	pool.AddCert(c.cert)
	_, err = cert.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		return denied("certificate_expired", "certificate of the %s was valid from %s to %s", who, cert.NotBefore.Format(time.RFC3339), cert.NotAfter.Format(time.RFC3339))
	}
	if err != nil {
		return denied("certificate_unknown", "certificate of the %s is not of this server: %w", who, err)
	}
	if !pattern.MatchString(cert.Subject.CommonName) {
		return denied("certificate_unknown", "certificate names no %s", who)
	}
	return cert.Subject.CommonName, nil
}

// ServerTLS is the server's end: TLS 1.3, client certificates asked for.
func ServerTLS(cert tls.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{cert},
		ClientAuth:   tls.RequestClientCert,
	}
}

func template(name string, now time.Time, life time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-early), NotAfter: now.Add(life),
	}, nil
}

func issue(t, parent *x509.Certificate, public *ecdsa.PublicKey, signer *ecdsa.PrivateKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, public, signer)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of %s: %w", t.Subject.CommonName, err)
	}
	return x509.ParseCertificate(der)
}

func encodePEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func decodePEM(b []byte, kind string) ([]byte, error) {
	p, rest := pem.Decode(b)
	if p == nil || p.Type != kind || len(bytes.TrimSpace(rest)) != 0 {
		return nil, fmt.Errorf("not one PEM block of type %s", kind)
	}
	return p.Bytes, nil
}

func encodeKey(k *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, err
	}
	return encodePEM("PRIVATE KEY", der), nil
}

func loadKey(b []byte) (*ecdsa.PrivateKey, error) {
	der, err := decodePEM(b, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	k, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("not an ECDSA P-256 key")
	}
	return key, nil
}
