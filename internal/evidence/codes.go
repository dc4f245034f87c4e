// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"fmt"
	"slices"
	"strings"

	"klatch/internal/fault"
)

// Reason is one entry of the catalog: why evidence is refused, and what to do
// about it.
type Reason struct {
	Code fault.Code
	Rule string // what must hold
	Next string // what the publisher does
}

// Catalog holds every code that the signing gate and evidence verify use.
// docs/reference/evidence.md has it as a table.
var Catalog = []Reason{
	{"no_evidence", "every published livepatch has an evidence file beside it", "sign it and publish again: klatch-forge sign, klatch-forge publish"},
	{"no_policy", "the repository has an evidence policy", "publish with a klatch-forge that knows of evidence"},
	{"policy_malformed", "the policy is in its one form and asks no less than the publisher's profile does; no key has two names", "mend evidence.toml, raise its version, publish again"},
	{"evidence_malformed", "an evidence file is in its one form", "sign again with klatch-forge sign"},
	{"statement_malformed", "a statement is in its one form, without members that nobody looked at", "make the statement again with klatch-forge"},
	{"payload_type", "what was signed as something else is no statement", "make the statement again with klatch-forge"},
	{"signature_count", "a statement has exactly one signature: it speaks for one signer", "let each signer sign a statement of their own"},
	{"unknown_signer", "every signer is in the policy", "add the key: klatch-forge evidence allow; or remove the statement"},
	{"bad_signature", "the signature fits the statement", "get the statement again from its signer"},
	{"predicate_unknown", "a statement is a provenance, a test result, a review or a VEX document", "remove the statement"},
	{"signer_role", "a signer says only what their role may say", "give the signer the role in evidence.toml, or let another sign"},
	{"signer_name", "a statement speaks in the name of its signer", "make the statement again with the signer's own key"},
	{"signed_twice", "each signer has one statement of a sort: thresholds count signers", "remove the older statement"},
	{"other_module", "a statement is about these bytes at this sequence", "build, test and review this one"},
	{"other_kernel", "a statement is about exactly this kernel build", "build, test and review for this kernel"},
	{"from_the_future", "nothing was finished after the livepatch was signed", "set the clocks, then make the statement again"},
	{"too_old", "a statement is not older than the policy allows when the livepatch is signed", "do it again: klatch-forge build, test or review"},
	{"no_provenance", "a builder says what the livepatch was built from", "build again: klatch-forge build"},
	{"too_few_builders", "as many builders as the policy asks for made the same bytes", "on another machine: klatch-forge confirm; then here: klatch-forge evidence add"},
	{"builders_differ", "all builders made the same bytes from the same sources with the same tools", "find out which builder is wrong before anything is signed: compare plan.json and build.json of both"},
	{"functions_differ", "the manifest names the functions that the builders replaced", "sign again with klatch-forge sign"},
	{"not_tested", "a tester tried these bytes on this kernel build", "klatch-forge test"},
	{"test_failed", "every scenario passed, whichever part of the result says otherwise", "look at test.json; mend the source patch or the lab, then test again"},
	{"scenario_missing", "every required scenario passed: those of the policy, those of the livepatch, and one for each earlier sequence", "test again with all scenarios: klatch-forge test"},
	{"fixes_differ", "the manifest says of each fix what the testers saw", "sign again with klatch-forge sign"},
	{"no_review", "as many reviewers as the policy asks for approved", "let somebody else than the author review it: klatch-forge review"},
	{"review_rejected", "no reviewer said no", "change the source patches as the reviewer asks, then build again"},
	{"review_of_other_sources", "the review is of exactly the source patches in the build", "review this build: klatch-forge review"},
	{"self_review", "the reviewer, of whom the policy gives an address, is somebody else than the author of each source patch", "let somebody else review it: klatch-forge review"},
	{"no_author", "each source patch names one author with an address", "add a line \"Author: NAME <ADDRESS>\" to the head of the source patch, then build again"},
	{"no_vex", "an analyst says which CVEs are fixed", "klatch-forge evidence vex"},
	{"vex_malformed", "the VEX document follows OpenVEX 0.2, one statement for each CVE", "make it again: klatch-forge evidence vex"},
	{"vex_differs", "the VEX document calls fixed exactly what the livepatch fixes", "make it again: klatch-forge evidence vex"},
	{"bundle_differs", "bundle, manifest and module are the publisher's, at the path that follows from them", "do not use this livepatch; tell the publisher"},
}

func nextStep(code fault.Code) string {
	i := slices.IndexFunc(Catalog, func(r Reason) bool { return r.Code == code })
	if i < 0 {
		panic(fmt.Sprintf("evidence code %s is not in the catalog", code)) // a test looks for all of them
	}
	return Catalog[i].Next
}

// Document writes the catalog as a Markdown table.
func Document() string {
	var b strings.Builder
	b.WriteString("| code | what must hold | next step |\n| --- | --- | --- |\n")
	for _, r := range Catalog {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", r.Code, r.Rule, r.Next)
	}
	return b.String()
}
