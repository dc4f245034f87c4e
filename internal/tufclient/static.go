// SPDX-License-Identifier: Apache-2.0

package tufclient

import (
	"context"
	"errors"
	"net/http"
	"net/url"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/fault"
)

// Static gets a file of the repository that the metadata does not name, such
// as those of the transparency log. Nothing about it is verified: its reader
// must do that. NotFound means that the server does not have it.
func (s *Snapshot) Static(ctx context.Context, name string, limit int64) ([]byte, error) {
	address, err := url.JoinPath(s.cfg.BaseURL, name)
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_url", "repository address: %w", err)
	}
	f := fetcher{ctx: ctx, client: s.cfg.Client, timeout: s.cfg.Timeout}
	b, err := f.DownloadFile(address, limit, 0)
	if status, ok := errors.AsType[*metadata.ErrDownloadHTTP](err); ok {
		if status.StatusCode == http.StatusNotFound || status.StatusCode == http.StatusGone {
			return nil, fault.New(fault.NotFound, "file_missing", "the server does not have %s", name)
		}
		return nil, explain(err)
	}
	return b, err
}
