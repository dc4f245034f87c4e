// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"klatch/internal/fault"
)

// payloadType is what a signature covers besides the payload: bytes that were
// signed as something else are never taken for a statement.
const payloadType = "application/vnd.in-toto+json"

// maxEnvelope limits one envelope, in bytes. The provenance of a livepatch
// with a thousand fixes has a tenth of it.
const maxEnvelope = 3 << 20

// Envelope is a signed statement in the form of DSSE 1.0
// (github.com/secure-systems-lab/dsse, envelope.md).
type Envelope struct {
	PayloadType string      `json:"payloadType"`
	Payload     []byte      `json:"payload"`
	Signatures  []Signature `json:"signatures"`
}

// Signature is one signature of an envelope. KeyID is the SHA-256 of the
// Ed25519 public key.
type Signature struct {
	KeyID string `json:"keyid"`
	Sig   []byte `json:"sig"`
}

// pae is the pre-authentication encoding: what is signed.
func pae(kind string, payload []byte) []byte {
	return append(fmt.Appendf(nil, "DSSEv1 %d %s %d ", len(kind), kind, len(payload)), payload...)
}

// seal signs a payload.
func seal(payload []byte, k PrivateKey) Envelope {
	return Envelope{payloadType, payload, []Signature{{k.Public().ID(), ed25519.Sign(k.key, pae(payloadType, payload))}}}
}

// open verifies an envelope and says who signed it. An envelope has exactly
// one signature, by a signer of the policy: a statement speaks for the one who
// is named in it, and thresholds count statements.
func (e Envelope) open(p Policy) (Signer, error) {
	var none Signer
	switch {
	case e.PayloadType != payloadType:
		return none, refuse("payload_type", "envelope holds %.60q, want %q", e.PayloadType, payloadType)
	case len(e.Signatures) != 1:
		return none, refuse("signature_count", "envelope has %d signatures, want one", len(e.Signatures))
	}
	s := e.Signatures[0]
	signer, ok := p.signer(s.KeyID)
	if !ok {
		return none, refuse("unknown_signer", "key %.16s… is none of the publisher's policy", s.KeyID)
	}
	if !ed25519.Verify(signer.Key.bytes[:], pae(e.PayloadType, e.Payload), s.Sig) {
		return none, refuse("bad_signature", "signature by key %.16s… (%s) does not fit its statement", s.KeyID, signer.Name)
	}
	return signer, nil
}

// Encode writes the one form of an envelope.
func (e Envelope) Encode() ([]byte, error) { return encode(e) }

// ParseEnvelope reads what Encode wrote, and nothing else.
func ParseEnvelope(b []byte) (Envelope, error) {
	var e Envelope
	if len(b) > maxEnvelope {
		return e, refuse("statement_malformed", "envelope has %d bytes, limit %d", len(b), maxEnvelope)
	}
	if err := decode(b, &e); err != nil {
		return e, refuse("statement_malformed", "envelope: %w", err)
	}
	return e, nil
}

// encode and decode are the one form of everything here: JSON without spaces,
// members in the order of the type, a line end.
func encode(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return append(b, '\n'), nil
}

// decode refuses unknown, repeated and missing members, other spellings of the
// same value and trailing bytes: the encoding of what was read must be the
// input. in-toto lets readers pass over members that they do not know; what
// nobody looked at is not evidence, so we do not (ADR 0023).
func decode(b []byte, to any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(to); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("bytes after the end")
	}
	again, err := encode(to)
	if err != nil {
		return err
	}
	if !bytes.Equal(again, b) {
		return errors.New("not in its canonical form")
	}
	return nil
}

// refuse is an error with a code of the catalog; its hint is the next step.
func refuse(code fault.Code, format string, args ...any) error {
	return fault.New(fault.Untrusted, code, format, args...).WithHint("%s", nextStep(code))
}
