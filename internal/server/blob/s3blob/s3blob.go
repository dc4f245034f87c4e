// SPDX-License-Identifier: Apache-2.0

// Package s3blob keeps the files of package blob in an object store that
// speaks S3. Objects carry the headers that a network of caches needs, so the
// bucket can be served without us. Credentials come from where the store's own
// tools take them (environment, shared files, instance role), never from an
// address. Only cmd may import it. Start with Open.
package s3blob

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go"

	"klatch/internal/fault"
	"klatch/internal/server/blob"
)

// Store is a bucket, or what is below a prefix of one.
type Store struct {
	client         *s3.Client
	bucket, prefix string
	place          string
}

var _ blob.Store = (*Store)(nil)

// Limits. A bucket answers within a minute or counts as away; a listing of
// more names than a repository can have is not ours.
const (
	answerLimit = time.Minute
	maxNames    = 1_000_000
)

var bucketPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)

// Open reads an address such as
//
//	s3://BUCKET/PREFIX?endpoint=https://s3.example.org&region=eu-1&path_style=true
//
// of which all but the bucket may be left out. It asks the store nothing yet.
func Open(ctx context.Context, address string) (*Store, error) {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "bad_storage", format, args...).
			WithHint("write it as s3://BUCKET/PREFIX?endpoint=https://s3.example.org&region=REGION&path_style=true")
	}
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "s3" || u.User != nil || u.Fragment != "" || !bucketPattern.MatchString(u.Host) {
		return nil, bad("%.200q is not the address of a bucket", address)
	}
	prefix := strings.Trim(u.Path, "/")
	if prefix != "" {
		if err := blob.Valid(prefix); err != nil {
			return nil, bad("prefix %.160q cannot go before names of files", prefix)
		}
		prefix += "/"
	}
	q := u.Query()
	for name := range q {
		if !slices.Contains([]string{"endpoint", "region", "path_style"}, name) {
			return nil, bad("%.60q is no part of an address of a bucket", name)
		}
	}
	endpoint := q.Get("endpoint")
	if e, err := url.Parse(endpoint); err != nil || endpoint != "" && (e.Host == "" || e.User != nil || e.Scheme != "https" && e.Scheme != "http") {
		return nil, bad("endpoint %.200q is not an https or http address", endpoint)
	}
	// Their own sort of client: the loader adds an authority to it where the
	// environment names one (AWS_CA_BUNDLE).
	client := awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
		t.TLSHandshakeTimeout, t.ResponseHeaderTimeout = 20*time.Second, answerLimit
		t.IdleConnTimeout, t.MaxIdleConnsPerHost = time.Minute, 16
	})
	cfg, err := config.LoadDefaultConfig(ctx, config.WithHTTPClient(client))
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_storage", "settings of the object store: %w", err)
	}
	if r := q.Get("region"); r != "" {
		cfg.Region = r
	}
	if cfg.Region == "" {
		cfg.Region = "us-east-1" // stores of one's own do not care, and the signature needs a word
	}
	calls := s3.NewFromConfig(cfg, func(o *s3.Options) {
		if endpoint != "" {
			o.BaseEndpoint = aws.String(endpoint)
		}
		o.UsePathStyle = q.Get("path_style") == "true"
		// Other makers' stores do not know the newer checksums. Readers of
		// ours verify digests that somebody signed.
		o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
		o.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
	})
	return &Store{client: calls, bucket: u.Host, prefix: prefix, place: address}, nil
}

// Place is the address.
func (s *Store) Place() string { return s.place }

// explain gives the store's errors our kinds.
func (s *Store) explain(name string, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[smithy.APIError](err); ok {
		switch e.ErrorCode() {
		case "NoSuchKey", "NotFound":
			return blob.Missing(name, errors.New("the object store does not have it"))
		case "NoSuchBucket":
			return fault.New(fault.NotFound, "no_bucket", "object store has no bucket %s", s.bucket).
				WithHint("make it with the object store's own tools")
		case "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden":
			return fault.New(fault.Denied, "storage_denied", "object store refuses %s in bucket %s: %s", name, s.bucket, e.ErrorCode()).
				WithHint("give the service credentials that may read, write, list and delete there: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a shared file")
		}
	}
	return fault.New(fault.Unavailable, "storage_unavailable", "object store, %s in bucket %s: %w", name, s.bucket, err).
		WithHint("check the address and that the object store is up")
}

func (s *Store) key(name string) *string { return aws.String(s.prefix + name) }

// Open asks for the object.
func (s *Store) Open(ctx context.Context, name string) (blob.Reader, error) {
	if err := blob.Valid(name); err != nil {
		return nil, err
	}
	out, err := s.client.GetObject(ctx, &s3.GetObjectInput{Bucket: &s.bucket, Key: s.key(name)})
	if err != nil {
		return nil, s.explain(name, err)
	}
	if out.ContentLength == nil || *out.ContentLength < 0 {
		return nil, errors.Join(fault.New(fault.Unavailable, "storage_unavailable", "object store does not say how long %s is", name), out.Body.Close())
	}
	return &reader{ctx: ctx, s: s, name: name, tag: out.ETag, size: *out.ContentLength, body: out.Body}, nil
}

// reader reads an object; seeking asks again, for the same object.
type reader struct {
	ctx      context.Context // of Open, as http.ServeContent has no room for one
	s        *Store
	name     string
	tag      *string
	size, at int64
	body     io.ReadCloser // nil after a seek
}

func (r *reader) Size() int64 { return r.size }

func (r *reader) Read(p []byte) (int, error) {
	if r.at >= r.size {
		return 0, io.EOF
	}
	if r.body == nil {
		out, err := r.s.client.GetObject(r.ctx, &s3.GetObjectInput{Bucket: &r.s.bucket, Key: r.s.key(r.name), IfMatch: r.tag, Range: aws.String(fmt.Sprintf("bytes=%d-", r.at))})
		if err != nil {
			return 0, r.s.explain(r.name, err)
		}
		r.body = out.Body
	}
	n, err := r.body.Read(p)
	r.at += int64(n)
	if errors.Is(err, io.EOF) && r.at < r.size {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (r *reader) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += r.at
	case io.SeekEnd:
		offset += r.size
	}
	if offset < 0 {
		return 0, errors.New("seek before the beginning")
	}
	if offset == r.at {
		return offset, nil
	}
	err := r.Close()
	r.at = offset
	return offset, err
}

func (r *reader) Close() error {
	if r.body == nil {
		return nil
	}
	err := r.body.Close()
	r.body = nil
	return err
}

// Put writes the object in one request: it is there whole, or not.
func (s *Store) Put(ctx context.Context, name string, content []byte, h blob.Header) error {
	if err := blob.Valid(name); err != nil {
		return err
	}
	in := &s3.PutObjectInput{Bucket: &s.bucket, Key: s.key(name), Body: bytes.NewReader(content), ContentLength: aws.Int64(int64(len(content)))}
	if h.CacheControl != "" {
		in.CacheControl = aws.String(h.CacheControl)
	}
	if h.ContentType != "" {
		in.ContentType = aws.String(h.ContentType)
	}
	_, err := s.client.PutObject(ctx, in)
	return s.explain(name, err)
}

// List asks page by page.
func (s *Store) List(ctx context.Context, prefix string) ([]string, error) {
	if err := blob.ValidPrefix(prefix); err != nil {
		return nil, err
	}
	var names []string
	pages := s3.NewListObjectsV2Paginator(s.client, &s3.ListObjectsV2Input{Bucket: &s.bucket, Prefix: s.key(prefix)})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, s.explain(prefix, err)
		}
		for _, o := range page.Contents {
			name, ok := strings.CutPrefix(aws.ToString(o.Key), s.prefix)
			if ok && blob.Valid(name) == nil && strings.HasPrefix(name, prefix) {
				names = append(names, name)
			}
		}
		if len(names) > maxNames {
			return nil, fault.New(fault.Invalid, "bad_storage", "bucket %s holds over %d files below %q; it is no repository's", s.bucket, maxNames, s.prefix)
		}
	}
	slices.Sort(names)
	return names, nil
}

// Delete removes the object.
func (s *Store) Delete(ctx context.Context, name string) error {
	if err := blob.Valid(name); err != nil {
		return err
	}
	_, err := s.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &s.bucket, Key: s.key(name)})
	if err = s.explain(name, err); fault.CodeOf(err) == "file_missing" {
		err = nil
	}
	return err
}
