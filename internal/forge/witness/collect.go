// SPDX-License-Identifier: Apache-2.0

package witness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/fault"
	"klatch/internal/translog"
)

// patience bounds one question to one witness.
const patience = 30 * time.Second

// Collect asks all witnesses of a policy to cosign the log's newest checkpoint
// and returns it with every good cosignature, if they fill the quorum.
func Collect(ctx context.Context, client *http.Client, policy *translog.Policy, log *translog.Log) ([]byte, error) {
	lines, problems := make([]string, len(policy.Witnesses)), make([]error, len(policy.Witnesses))
	var all sync.WaitGroup
	for i, w := range policy.Witnesses {
		if w.URL == "" {
			problems[i] = fmt.Errorf("witness %s: the policy has no address for it", w.Name)
			continue
		}
		all.Go(func() {
			var err error
			if lines[i], err = ask(ctx, client, w, log); err != nil {
				problems[i] = fmt.Errorf("witness %s: %w", w.Name, err)
			}
		})
	}
	all.Wait()
	signed := append(slices.Clone(log.Checkpoint.Signed), strings.Join(lines, "")...)
	if _, err := policy.Open(signed); err != nil {
		why := errors.Join(problems...)
		for _, p := range problems {
			if fault.CodeOf(p) == translog.CodeInconsistent || fault.CodeOf(p) == translog.CodeRollback {
				return nil, p // waiting does not help
			}
		}
		if why == nil {
			return nil, err
		}
		return nil, fault.New(fault.Unavailable, translog.CodeQuorum, "%w: %w", err, why).
			WithHint("the entry is in the log; repeat when the witnesses answer: klatch-forge publish")
	}
	return signed, nil
}

// ask gets one witness's cosignature. A witness that remembers another size
// than we think says so, and is asked once more.
func ask(ctx context.Context, client *http.Client, w translog.Witness, log *translog.Log) (string, error) {
	old, status, body, err := int64(0), 0, []byte(nil), error(nil)
	for range 2 {
		proof, perr := log.ProveExtends(old)
		if perr != nil {
			return "", perr
		}
		if status, body, err = post(ctx, client, w.URL, translog.Submission{Old: old, Proof: proof, Checkpoint: log.Checkpoint.Signed}); err != nil {
			return "", err
		}
		if status != http.StatusConflict {
			break
		}
		size, err := strconv.ParseInt(strings.TrimSuffix(string(body), "\n"), 10, 64)
		switch {
		case err != nil || size < 0:
			return "", fault.New(fault.Unavailable, "witness_answer", "status 409 with %.60q", body)
		case size > log.Checkpoint.Size:
			return "", fault.New(fault.Conflict, translog.CodeRollback, "it has seen %d entries, this log has %d", size, log.Checkpoint.Size).
				WithHint("the log was restored from a backup: docs/howto/audit-the-log.md")
		case size == old:
			return "", fault.New(fault.Untrusted, translog.CodeInconsistent, "it has seen another history of %d entries", size).
				WithHint("the log was restored from a backup, or its key is used elsewhere: docs/howto/audit-the-log.md")
		}
		old = size
	}
	switch status {
	case http.StatusOK:
		return lineOf(w.Key, log.Checkpoint.Signed, body)
	case http.StatusUnprocessableEntity:
		return "", fault.New(fault.Untrusted, translog.CodeInconsistent, "it does not see that this log continues the one it saw (%d entries)", old).
			WithHint("the log was restored from a backup, or its key is used elsewhere: docs/howto/audit-the-log.md")
	case http.StatusNotFound, http.StatusForbidden:
		return "", fault.New(fault.Unavailable, "witness_answer", "it does not serve this log (status %d)", status).
			WithHint("give its operator the log's key: klatch-forge log show")
	}
	return "", fault.New(fault.Unavailable, "witness_answer", "status %d", status)
}

func post(ctx context.Context, client *http.Client, base string, s translog.Submission) (int, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/add-checkpoint", bytes.NewReader(s.Encode()))
	if err != nil {
		return 0, nil, fault.New(fault.Invalid, "bad_url", "%w", err)
	}
	answer, err := client.Do(r)
	if err != nil {
		return 0, nil, fault.New(fault.Unavailable, "witness_away", "%w", err)
	}
	defer answer.Body.Close() //nolint:errcheck // read only
	body, err := io.ReadAll(io.LimitReader(answer.Body, 16<<10))
	if err != nil {
		return 0, nil, fault.New(fault.Unavailable, "witness_away", "%w", err)
	}
	return answer.StatusCode, body, nil
}

// lineOf takes the witness's own good line out of an answer; whatever else is
// there is not taken over.
func lineOf(key *translog.Verifier, signed, answer []byte) (string, error) {
	text, _, _ := bytes.Cut(signed, []byte("\n\n"))
	n, err := note.Open(slices.Concat(text, []byte("\n\n"), answer), note.VerifierList(key))
	if err != nil {
		return "", fault.New(fault.Untrusted, "witness_answer", "its cosignature: %w", err)
	}
	return "— " + n.Sigs[0].Name + " " + n.Sigs[0].Base64 + "\n", nil
}
