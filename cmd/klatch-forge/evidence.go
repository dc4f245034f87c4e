// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"klatch/internal/cli"
	"klatch/internal/cve"
	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/forge/attest"
	"klatch/internal/forge/build"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/proof"
	"klatch/internal/forge/sign"
	"klatch/internal/forge/triage"
	"klatch/internal/kernel"
)

func evidenceCommand(o *options) *cobra.Command {
	c := &cobra.Command{Use: "evidence", Short: "Signed statements beside a livepatch: who built, tested and reviewed it"}
	c.AddCommand(evidenceKey(o), evidenceAllow(o), evidenceAdd(o), evidenceVEX(o), evidenceShow(o), evidenceVerify())
	return c
}

func evidenceKey(o *options) *cobra.Command {
	var role, name string
	c := &cobra.Command{
		Use:   "key --role ROLE --name NAME",
		Short: "Make a key that signs statements in one role",
		Long: `Makes a key in this data folder's keys/, mode 0600, and prints the line that the
publisher gives to "evidence allow". Roles: builder, tester, reviewer, analyst.
A key of a reviewer has the reviewer's own name and lies on that person's
machine. None of these keys signs modules, manifests or metadata.`,
		Example: "  klatch-forge evidence key --role reviewer --name bob@example.org",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "make a key")
			}
			k, err := attest.MakeKey(d, name, evidence.Role(role))
			if err != nil {
				return cli.Cannot(err, "make key %s", name)
			}
			also := ""
			if evidence.Role(role) == evidence.Reviewer && !strings.Contains(name, "@") {
				also = " --also YOUR@ADDRESS"
			}
			out(cmd, "klatch-forge evidence allow --role %s --name %s%s %s\n", role, name, also, k.Public())
			return nil
		},
	}
	c.Flags().StringVar(&role, "role", "", "builder, tester, reviewer or analyst (needed)")
	c.Flags().StringVar(&name, "name", "", "who signs with it (needed)")
	for _, f := range []string{"role", "name"} {
		_ = c.MarkFlagRequired(f)
	}
	return c
}

func evidenceAllow(o *options) *cobra.Command {
	var role, also []string
	var name string
	c := &cobra.Command{
		Use:   "allow --role ROLE --name NAME KEY",
		Short: "Let a key sign statements: add it to evidence.toml",
		Long: `Adds a signer to evidence.toml, the policy, and raises its version. Compare the
key with what its holder says, by another way than the one it came. --also
names what else the same person is called, such as an address: whoever wrote a
source patch must not be its reviewer.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "allow a key")
			}
			k, err := evidence.ParsePublicKey(args[0])
			if err != nil {
				return cli.Cannot(err, "allow a key")
			}
			s := evidence.Signer{Name: name, Key: k, Also: also}
			for _, r := range role {
				s.Roles = append(s.Roles, evidence.Role(r))
			}
			p, err := attest.Allow(d, s)
			if err != nil {
				return cli.Cannot(err, "allow key %s", name)
			}
			out(cmd, "policy %d: %s may sign as %s\n", p.Version, name, strings.Join(role, ", "))
			return nil
		},
	}
	c.Flags().StringSliceVar(&role, "role", nil, "builder, tester, reviewer or analyst; may be repeated (needed)")
	c.Flags().StringVar(&name, "name", "", "who signs with it (needed)")
	c.Flags().StringSliceVar(&also, "also", nil, "another name or address of the same person; may be repeated")
	for _, f := range []string{"role", "name"} {
		_ = c.MarkFlagRequired(f)
	}
	return c
}

func evidenceAdd(o *options) *cobra.Command {
	var release string
	c := &cobra.Command{
		Use:   "add --kernel RELEASE FILE...",
		Short: "Take statements that others signed about the newest livepatch",
		Long: `Takes statements that a second builder, a tester or a reviewer signed on another
machine. Only those are taken that a signer of evidence.toml signed, about
exactly these bytes.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "add statements")
			}
			b, _, err := newestBuild(d, kernel.Release(release))
			if err != nil {
				return cli.Cannot(err, "add statements")
			}
			for _, f := range args {
				e, err := attest.ReadStatement(f)
				if err != nil {
					return cli.Cannot(err, "add %s", f)
				}
				file, s, err := attest.Add(d, b, e)
				if err != nil {
					return cli.Cannot(err, "add %s (%s)", f, fault.CodeOf(err))
				}
				out(cmd, "added     %s by %s: %s\n", s.Role, s.Signer.Name, file)
			}
			return nil
		},
	}
	kernelFlag(c, &release)
	return c
}

func evidenceVEX(o *options) *cobra.Command {
	f := &triageFlags{}
	var as string
	c := &cobra.Command{
		Use:   "vex --kernel RELEASE",
		Short: "Sign which CVEs the newest livepatch fixes, and what is known of others",
		Long: `Signs an OpenVEX document: fixed is what the livepatch fixes; what triage says of
other CVEs on this kernel comes from the feeds and the reviewed decisions of
the data folder. A build makes one with the fixes alone.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "sign a VEX document")
			}
			b, _, err := newestBuild(d, kernel.Release(f.kernel))
			if err != nil {
				return cli.Cannot(err, "sign a VEX document")
			}
			k, err := attest.Key(d, evidence.Analyst, as)
			if err != nil {
				return cli.Cannot(err, "sign a VEX document")
			}
			rep, err := report(cmd, o, f)
			if err != nil {
				return cli.Cannot(err, "triage for kernel %s", f.kernel)
			}
			e, err := attest.VEX(k, b, vexOf(rep), time.Now())
			if err != nil {
				return cli.Cannot(err, "sign a VEX document")
			}
			file, err := attest.Put(filepath.Dir(b.Module.Path), evidence.Analyst, k.Name, e)
			if err != nil {
				return cli.Cannot(err, "sign a VEX document")
			}
			out(cmd, "signed    VEX document by %s: %s\n", k.Name, file)
			return nil
		},
	}
	f.add(c)
	c.Flags().Lookup("json").Hidden = true
	c.Flags().StringVar(&as, "as", "", "name of the key, where there are several")
	return c
}

// vexOf puts what triage decided into VEX. What is fixed in the kernel itself
// is left out: the document is about what the livepatch changes and what stays.
func vexOf(rep triage.Report) []evidence.VEXStatement {
	var all []evidence.VEXStatement
	for _, r := range rep.Rows {
		s := evidence.VEXStatement{Vulnerability: evidence.VEXName{Name: r.CVE}, Status: r.Status, Notes: r.Reason}
		switch r.Status {
		case cve.NotAffected:
			s.Justification, s.Notes, s.ImpactStatement = r.Justification, "", r.Reason
		case cve.Affected:
			s.ActionStatement = fmt.Sprintf("no livepatch (%s): update the kernel package and reboot", r.Treatment)
		case cve.UnderInvestigation:
		default:
			continue
		}
		all = append(all, s)
	}
	return all
}

func evidenceShow(o *options) *cobra.Command {
	var release string
	c := &cobra.Command{
		Use:   "show --kernel RELEASE",
		Short: "Say what the evidence of the newest livepatch lacks before it can be signed",
		Long:  `Runs the check of the signing gate and signs nothing.`,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := o.data()
			if err != nil {
				return cli.Cannot(err, "show the evidence")
			}
			b, _, err := newestBuild(d, kernel.Release(release))
			if err != nil {
				return cli.Cannot(err, "show the evidence")
			}
			p, err := attest.ReadPolicy(d)
			if err != nil {
				return cli.Cannot(err, "show the evidence")
			}
			all, err := attest.Statements(filepath.Dir(b.Module.Path))
			if err != nil {
				return cli.Cannot(err, "show the evidence")
			}
			for _, e := range all {
				s, err := evidence.Open(e, p)
				if err != nil {
					return cli.Cannot(err, "show the evidence (%s)", fault.CodeOf(err))
				}
				out(cmd, "%-9s %s\n", s.Role, s.Signer.Name)
			}
			earlier, err := sign.Before(d, b)
			if err != nil {
				return cli.Cannot(err, "show the evidence")
			}
			f := evidence.File{About: attest.About(b), Signed: time.Now()}
			rep, err := evidence.Check(p, attest.Facts(f, earlier, time.Now(), nil), all)
			if err != nil {
				return cli.Cannot(err, "sign sequence %d yet (%s)", b.Sequence, fault.CodeOf(err))
			}
			printEvidence(cmd, rep)
			return nil
		},
	}
	kernelFlag(c, &release)
	return c
}

func printEvidence(cmd *cobra.Command, r evidence.Report) {
	for _, row := range []struct {
		what string
		who  []string
	}{{"built by", r.Builders}, {"tested by", r.Testers}, {"reviewed by", r.Reviewers}, {"CVEs by", r.Analysts}} {
		out(cmd, "%-11s %s\n", row.what, strings.Join(row.who, ", "))
	}
	for _, n := range r.Notes {
		out(cmd, "NOTE        %s\n", n)
	}
}

// attestBuild signs the provenance of a build, and which CVEs it fixes, with
// the keys that lie here. Without a key nothing is signed.
func attestBuild(cmd *cobra.Command, o *options, d datadir.Dir, p compose.Plan, b build.Result, started time.Time) error {
	dir := build.Dir(d.Path, b.Kernel, b.Sequence)
	k, err := attest.Key(d, evidence.Builder, "")
	if err != nil {
		return unsigned(cmd, o, err, "who built it")
	}
	e, err := attest.Provenance(k, b, p, version, started, time.Now())
	if err != nil {
		return err
	}
	if _, err := attest.Put(dir, evidence.Builder, k.Name, e); err != nil {
		return err
	}
	if k, err = attest.Key(d, evidence.Analyst, ""); err != nil {
		return unsigned(cmd, o, err, "which CVEs it fixes")
	}
	if e, err = attest.VEX(k, b, nil, time.Now()); err != nil {
		return err
	}
	_, err = attest.Put(dir, evidence.Analyst, k.Name, e)
	return err
}

// attestTest signs a test's result, whatever it is.
func attestTest(cmd *cobra.Command, o *options, d datadir.Dir, b build.Result, r proof.Result) error {
	k, err := attest.Key(d, evidence.Tester, "")
	if err != nil {
		return unsigned(cmd, o, err, "how it was tested")
	}
	e, err := attest.Test(k, b, r, time.Now())
	if err != nil {
		return err
	}
	_, err = attest.Put(build.Dir(d.Path, b.Kernel, b.Sequence), evidence.Tester, k.Name, e)
	return err
}

// unsigned says that nothing was signed where no key lies or nobody said
// which; other errors stay.
func unsigned(cmd *cobra.Command, o *options, err error, what string) error {
	if c := fault.CodeOf(err); c == "no_key" || c == "which_key" {
		o.console(cmd).say("nobody signs %s: %s", what, err)
		return nil
	}
	return err
}
