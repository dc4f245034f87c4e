// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/sha1" //nolint:gosec // how mokutil names a certificate; nothing is decided by it
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/sign"
)

func keysCertificate(o *options) *cobra.Command {
	c := &cobra.Command{
		Use:   "certificate [FILE.der]",
		Short: "The module key's certificate, as firmware and shim enroll it",
		Long: `Shows the certificate of the module key, and writes it in DER into a file that
does not exist yet. With Secure Boot a kernel takes the publisher's livepatches
only where this certificate is enrolled: in the owner's list of shim (MOK), in
the firmware's db, or built into the kernel. The file is public.

The fingerprints are for comparing: mokutil shows SHA-1, klatch-forge and
firmware show SHA-256. docs/howto/secure-boot.md tells all three ways.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "show the module certificate")
			}
			cert, err := sign.ModuleCert(d)
			if err != nil {
				return cli.Cannot(err, "show the module certificate")
			}
			if len(args) == 1 {
				if err := writeNew(args[0], cert.Raw); err != nil {
					return cli.Cannot(err, "write the module certificate")
				}
			}
			printCertificate(cmd, cert)
			if len(args) == 1 {
				out(cmd, "file     %s, DER\n", args[0])
			}
			return nil
		},
	}
	return c
}

func writeNew(path string, content []byte) error {
	if _, err := os.Lstat(path); err == nil {
		return fault.New(fault.Conflict, "file_exists", "%s exists", path).WithHint("choose another name, or remove it")
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.WriteFile(path, content, 0o644)
}

func printCertificate(cmd *cobra.Command, c *x509.Certificate) {
	out(cmd, "subject  %s\nserial   %x\nkey      %s\nvalid    %s to %s; kernels do not look at it\n", c.Subject, c.SerialNumber,
		c.PublicKeyAlgorithm, c.NotBefore.UTC().Format("2006-01-02"), c.NotAfter.UTC().Format("2006-01-02"))
	long, short := sha256.Sum256(c.Raw), sha1.Sum(c.Raw) //nolint:gosec // as above
	out(cmd, "sha256   %s\nsha1     %s\n", colons(long[:]), colons(short[:]))
}

// colons writes a fingerprint as OpenSSL and mokutil do.
func colons(b []byte) string {
	parts := make([]string, len(b))
	for i, c := range b {
		parts[i] = fmt.Sprintf("%02x", c)
	}
	return strings.Join(parts, ":")
}
