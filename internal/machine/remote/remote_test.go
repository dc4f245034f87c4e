// SPDX-License-Identifier: Apache-2.0

package remote

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/pki"
	"klatch/internal/wire"
)

func open(t *testing.T, dir string) *Client {
	t.Helper()
	c, err := Open(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestEnrollmentIsKept(t *testing.T) {
	f := agenttest.NewFleet(t, "x")
	m := agenttest.NewMachine(t)
	dir := t.TempDir()
	c := open(t, dir)
	if _, ok := c.Identity(); ok {
		t.Error("enrolled before enrolling")
	}
	if _, err := c.Check(t.Context(), wire.CheckRequest{}); fault.CodeOf(err) != "not_enrolled" {
		t.Errorf("check without enrollment: %v", err)
	}
	id, err := c.Enroll(t.Context(), f.URL, f.Token, wire.Facts{Kernel: m.Kernel})
	if err != nil || id.MachineID != agenttest.MachineID || id.Server != f.URL {
		t.Fatalf("%+v, %v", id, err)
	}
	st, err := os.Stat(filepath.Join(dir, credentialFile))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("credential: %v, %v", st, err)
	}
	if _, err := os.Stat(c.pendingPath()); err == nil {
		t.Error("the key of the enrollment was left behind")
	}
	again := open(t, dir)
	if got, ok := again.Identity(); !ok || got != id {
		t.Errorf("after a restart: %+v", got)
	}
	if _, err := again.Check(t.Context(), wire.CheckRequest{Facts: wire.Facts{Kernel: m.Kernel}}); err != nil {
		t.Error(err)
	}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).LogAttrs(t.Context(), slog.LevelInfo, "x", slog.Any("credential", *again.cred))
	if strings.Contains(log.String(), "PRIVATE") || !strings.Contains(log.String(), agenttest.MachineID) {
		t.Errorf("a credential is logged as %s", log.String())
	}
}

func TestEnrollmentThatIsRefused(t *testing.T) {
	f := agenttest.NewFleet(t, "x")
	other := agenttest.NewFleet(t, "y")
	for _, tt := range []struct {
		name, server string
		token        wire.Token
		code         fault.Code
	}{
		{"the token of another server is not said to this one", f.URL, other.Token, "wrong_server"},
		{"half a token", f.URL, f.Token[:20], "token_malformed"},
		{"not https", strings.Replace(f.URL, "https", "http", 1), f.Token, "bad_server"},
		{"a path in the address", f.URL + "/x", f.Token, "bad_server"},
		{"nobody there", agenttest.Away(t), f.Token, "server_unavailable"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := open(t, t.TempDir())
			_, err := c.Enroll(t.Context(), tt.server, tt.token, wire.Facts{})
			if fault.CodeOf(err) != tt.code || fault.HintOf(err) == "" {
				t.Errorf("err = %v (%s), want code %s and a hint", err, fault.CodeOf(err), tt.code)
			}
			if err != nil && strings.Contains(err.Error()+fault.HintOf(err), string(tt.token)) {
				t.Error("the error holds the token")
			}
			if _, ok := c.Identity(); ok {
				t.Error("enrolled all the same")
			}
		})
	}
}

func TestALostAnswerIsAskedForAgainWithTheSameKey(t *testing.T) {
	c := open(t, t.TempDir())
	first, _, err := c.enrollKey()
	if err != nil {
		t.Fatal(err)
	}
	second, _, err := c.enrollKey()
	if err != nil || !bytes.Equal(first, second) {
		t.Errorf("another key the second time, %v", err)
	}
}

func TestACertificateIsRenewedInTime(t *testing.T) {
	f := agenttest.NewFleet(t, "x")
	m := agenttest.NewMachine(t)
	dir := t.TempDir()
	c := open(t, dir)
	if _, err := c.Enroll(t.Context(), f.URL, f.Token, wire.Facts{Kernel: m.Kernel}); err != nil {
		t.Fatal(err)
	}
	q := wire.CheckRequest{Facts: wire.Facts{Kernel: m.Kernel}}
	if _, err := c.Check(t.Context(), q); err != nil || f.Certified() != 1 {
		t.Errorf("a fresh certificate was renewed: %d, %v", f.Certified(), err)
	}
	// Five days of seven are over.
	csr, err := pki.MachineRequest(c.cred.Key)
	if err != nil {
		t.Fatal(err)
	}
	old, err := f.Certify(agenttest.MachineID, csr, time.Now().Add(-5*24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	cred := *c.cred
	cred.Certificate = old.Certificate
	if err := c.keep(cred); err != nil {
		t.Fatal(err)
	}
	before := bytes.Clone(c.cred.Key)
	if _, err := c.Check(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	id, _ := c.Identity()
	if f.Certified() != 2 || time.Until(id.Expires) < 6*24*time.Hour || bytes.Equal(before, c.cred.Key) {
		t.Errorf("not renewed with a new key: %d, expires %s", f.Certified(), id.Expires)
	}
	if _, err := open(t, dir).Check(t.Context(), q); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

func TestADamagedCredentialIsNotQuoted(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, credentialFile), []byte(`{"format":"klatch-identity/1","key":"U0VDUkVU"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Open(dir, slog.New(slog.DiscardHandler))
	if fault.CodeOf(err) != "identity_malformed" || strings.Contains(err.Error(), "SECRET") {
		t.Errorf("err = %v", err)
	}
}

func TestWhatIsInBetweenIsNotTheServer(t *testing.T) {
	for _, tt := range []struct {
		status int
		body   string
		kind   fault.Kind
		code   fault.Code
	}{
		{403, `{"type":"denied","title":"machine is gone","status":403,"code":"machine_gone","hint":"enroll again"}`, fault.Denied, "machine_gone"},
		{503, `{"type":"unavailable","title":"busy","status":503}`, fault.Unavailable, ""},
		{502, `<html>Bad Gateway</html>`, fault.Unavailable, "server_strange"},
		{302, ``, fault.Unavailable, "server_strange"},
		{407, `{"type":"strange"}`, fault.Internal, "server_strange"},
		{200, `<html>Welcome</html>`, fault.Unavailable, "server_strange"},
		{200, strings.Repeat("x", wire.MaxBody+1), fault.Unavailable, "server_unavailable"},
	} {
		t.Run(fmt.Sprint(tt.status, " ", tt.body[:min(len(tt.body), 30)]), func(t *testing.T) {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Location", "https://elsewhere.example")
				w.WriteHeader(tt.status)
				_, _ = w.Write([]byte(tt.body))
			}))
			defer s.Close()
			client := s.Client()
			client.CheckRedirect = newClient(nil).CheckRedirect
			var out wire.CheckAnswer
			err := calls(client).Post(t.Context(), s.URL, wire.CheckRequest{}, &out)
			if fault.KindOf(err) != tt.kind || fault.CodeOf(err) != tt.code {
				t.Errorf("err = %v: %s %s, want %s %s", err, fault.KindOf(err), fault.CodeOf(err), tt.kind, tt.code)
			}
		})
	}
}
