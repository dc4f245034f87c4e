// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/pki"
	"klatch/internal/trustsign"
	"klatch/internal/tufclient"
)

const initHelp = `init makes the data folder of a server: a certificate authority for its
machines, a certificate for its own names, the publisher's trust anchor and
an admin token. The token is printed once; only its digest is kept.

--name is how machines reach the server, a host name or an address; give it
more than once for several. A folder that still holds ca.crt and ca.key keeps
them, so that enrolled machines stay enrolled.`

func initCommand(dir *string) *cobra.Command {
	var names []string
	var anchor, tokenFile, upstream string
	var allowLab bool
	c := &cobra.Command{
		Use:     "init --name NAME --anchor FILE",
		Short:   "make the server's data folder",
		Long:    initHelp,
		Example: "  klatch-server init --name klatch.example.org --name 192.0.2.10 --anchor anchor.json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			token, err := initialize(*dir, settings{Names: names, AllowLab: allowLab, Upstream: upstream}, anchor, tokenFile)
			if err != nil {
				return cli.Cannot(err, "make a server in %s", *dir)
			}
			w := cmd.OutOrStdout()
			fmt.Fprintf(w, "server made in %s for %v\n", *dir, names) //nolint:errcheck // told as far as possible
			if tokenFile != "" {
				fmt.Fprintf(w, "admin token written to %s\n", tokenFile) //nolint:errcheck // as above
				return nil
			}
			_, err = fmt.Fprintf(w, "admin token (shown once, keep it): %s\n", token)
			return err
		},
	}
	f := c.Flags()
	f.StringArrayVar(&names, "name", nil, "host name or address of this server; repeatable")
	f.StringVar(&anchor, "anchor", "", "the publisher's trust anchor file")
	f.BoolVar(&allowLab, "allow-lab", false, "accept an anchor with lab keys, which lie unprotected on one machine")
	f.StringVar(&tokenFile, "admin-token-file", "", "write the admin token to this file (0600) instead of printing it")
	f.StringVar(&upstream, "upstream", "", "where serve copies the repository from, again and again: an address or a folder")
	for _, name := range []string{"name", "anchor"} {
		if err := c.MarkFlagRequired(name); err != nil {
			panic(err) // the flag is two lines above
		}
	}
	return c
}

func initialize(dir string, s settings, anchor, tokenFile string) (token string, err error) {
	if _, err := os.Stat(filepath.Join(dir, settingsFile)); err == nil {
		return "", fault.New(fault.Conflict, "initialized", "%s holds a server already", dir).
			WithHint("start it: klatch-server serve --data %s", dir)
	}
	if s.Upstream != "" {
		if _, _, err := tufclient.Source(s.Upstream, nil); err != nil {
			return "", err
		}
	}
	a, err := loadAnchor(anchor, s.AllowLab)
	if err != nil {
		return "", err
	}
	if err := makeDir(dir); err != nil {
		return "", err
	}
	now := time.Now()
	ca, err := loadCA(dir)
	if errors.Is(err, fs.ErrNotExist) {
		ca, err = pki.NewCA("Klatch server "+s.Names[0], now)
	}
	if err != nil {
		return "", err
	}
	certPEM, keyPEM, err := ca.SignServer(s.Names, now)
	if err != nil {
		return "", err
	}
	secret, err := pki.NewSecret()
	if err != nil {
		return "", err
	}
	token = secret.Reveal()
	s.Format, s.AdminDigest = settingsFormat, digest(token)
	caCert, caKey, err := ca.Encode()
	if err != nil {
		return "", err
	}
	anchorBytes, err := trustsign.Anchor(*a)
	if err != nil {
		return "", err
	}
	if err := durable.WriteFile(filepath.Join(dir, caKeyFile), caKey, 0o600); err != nil {
		return "", err
	}
	if err := durable.WriteFile(filepath.Join(dir, caCertFile), caCert, 0o644); err != nil {
		return "", err
	}
	if err := writeCertificate(dir, certPEM, keyPEM); err != nil {
		return "", err
	}
	if err := durable.WriteFile(filepath.Join(dir, anchorFile), anchorBytes, 0o644); err != nil {
		return "", err
	}
	if tokenFile != "" {
		if err := durable.WriteFile(tokenFile, []byte(token+"\n"), 0o600); err != nil {
			return "", err
		}
	}
	return token, writeSettings(dir, s)
}
