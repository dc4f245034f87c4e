// SPDX-License-Identifier: Apache-2.0

package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"

	"klatch/internal/fault"
	"klatch/internal/wire"
)

// NewMachineKey makes a machine's key and the request for its certificate. The
// key is in PEM and secret; the request is in DER.
func NewMachineKey() (keyPEM, csr []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	if keyPEM, err = encodeKey(key); err != nil {
		return nil, nil, err
	}
	csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	return keyPEM, csr, err
}

// MachineRequest makes a request for a key that exists, to renew.
func MachineRequest(keyPEM []byte) (csr []byte, err error) {
	key, err := loadKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("machine key: %w", err)
	}
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
}

// LoadMachine joins a machine's certificate (DER) and key (PEM).
func LoadMachine(cert, keyPEM []byte) (tls.Certificate, error) {
	var none tls.Certificate
	key, err := loadKey(keyPEM)
	if err != nil {
		return none, fmt.Errorf("machine key: %w", err)
	}
	leaf, err := x509.ParseCertificate(cert)
	if err != nil {
		return none, fmt.Errorf("machine certificate: %w", err)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		return none, fault.New(fault.Internal, "key_mismatch", "machine key and certificate do not belong together").
			WithHint("enroll this machine with a fresh token: klatch enroll")
	}
	return tls.Certificate{Certificate: [][]byte{cert}, PrivateKey: key, Leaf: leaf}, nil
}

// TLSForToken is the machine's end while it enrolls: it talks only to a server
// whose chain holds the CA that the token names, under the host name or
// address asked for. An http.Transport with it must serve one host only.
func TLSForToken(t wire.Token, host string) (*tls.Config, error) {
	_, want, err := ParseToken(t)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: host,
		// The chain is verified below, against the one CA that the token
		// names: we have its fingerprint, not its certificate, so no pool can
		// be filled before the handshake. VerifyConnection also runs on
		// resumed connections.
		InsecureSkipVerify: true, //nolint:gosec // see above
		VerifyConnection: func(s tls.ConnectionState) error {
			for _, c := range s.PeerCertificates {
				if sha256.Sum256(c.Raw) != want || !c.IsCA {
					continue
				}
				pool := x509.NewCertPool()
				pool.AddCert(c)
				_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pool, DNSName: host, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
				if err != nil {
					return fault.New(fault.Untrusted, "server_untrusted", "certificate of server %s: %w", host, err)
				}
				return nil
			}
			return fault.New(fault.Untrusted, "wrong_server", "server %s is not the one that issued this token", host).
				WithHint("check the server's address, or get a token from that server")
		},
	}, nil
}

// TLSForMachine is an enrolled machine's end: the CA from the enrollment, and
// the certificate of the moment, which changes with each renewal.
func TLSForMachine(ca []byte, certificate func() (*tls.Certificate, error)) (*tls.Config, error) {
	c, err := x509.ParseCertificate(ca)
	if err != nil {
		return nil, fmt.Errorf("CA certificate: %w", err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(c)
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		RootCAs:    pool,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return certificate()
		},
	}, nil
}
