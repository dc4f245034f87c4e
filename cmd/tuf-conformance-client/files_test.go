// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

func downloadCases() []simCase {
	cases := []simCase{
		{"file download/client_downloads_expected_file", func(s *sim) {
			s.begin()
			s.add("targets", "target_file.txt", "target file contents")
			s.all()
			s.refresh(true)
			s.downloaded()
			s.download(true, "target_file.txt")
			s.downloaded("target file contents")
		}},
		{"file download/client_downloads_expected_file_in_sub_dir", func(s *sim) {
			s.begin()
			s.add("targets", "path/to/a/target_file.txt", "target file contents")
			s.all()
			s.download(true, "path/to/a/target_file.txt")
			s.downloaded("target file contents")
			if len(s.sent) != 1 || !strings.HasPrefix(s.sent[0], "path/to/a/") {
				s.t.Errorf("asked for %q", s.sent)
			}
		}},
		{"file download/repository_substitutes_target_file", func(s *sim) {
			s.begin()
			s.add("targets", "one", "first content")
			s.add("targets", "two", "content")
			s.all()
			s.download(true, "one")
			s.serve("one", "evil content") // shorter
			s.serve("two", "CONTENT")      // of the same length
			s.run(nil, s.fetch("one")...)  // its own copy is good enough, or an error
			s.downloaded("first content")
			s.download(false, "two")
			s.downloaded("first content")
		}},
		{"file download/multiple_changes_to_target", func(s *sim) {
			s.begin()
			s.add("targets", "file", "at first")
			s.all()
			s.download(true, "file")
			var more []string
			for i := range 11 {
				now := fmt.Sprintf("changed %d", i)
				s.add("targets", "file", now)
				s.add("targets", fmt.Sprintf("new-%d", i), fmt.Sprintf("new %d", i))
				s.all()
				if i%5 != 0 { // the client does not see each version
					continue
				}
				s.download(true, "file")
				s.downloaded(append([]string{now}, more...)...)
				s.download(true, fmt.Sprintf("new-%d", i))
				more = append(more, fmt.Sprintf("new %d", i))
				s.serve("file", "EVIL!!! "+now[8:])
				s.all()
				s.run(nil, s.fetch("file")...)
				s.downloaded(append([]string{now}, more...)...)
			}
		}},
		{"file download/download_with_unknown_hash_algorithm", func(s *sim) {
			s.add("targets", "file", "content", "sha512")
			f := s.lists["targets"].Signed.Targets["file"]
			f.Hashes = metadata.Hashes{"unknown-hash": f.Hashes["sha512"]}
			s.all()
			s.begin()
			s.download(false, "file")
			s.downloaded()
		}},
		{"file download/artifact_cache", func(s *sim) {
			s.add("targets", "file", "content")
			s.all()
			s.begin()
			s.download(true, "file")
			s.download(true, "file")
			if len(s.sent) != 1 {
				s.t.Errorf("asked for %q", s.sent)
			}
			s.add("targets", "file", "CONTENT")
			s.all()
			s.download(true, "file")
			s.downloaded("CONTENT")
		}},
	}
	for _, algorithms := range [][]string{{"sha256"}, {"sha512"}, {"sha256", "sha512"}} {
		cases = append(cases, simCase{"file download/download_with_hash_algorithms: " + strings.Join(algorithms, " and "), func(s *sim) {
			s.add("targets", "file", "content", algorithms...)
			s.all()
			s.begin()
			s.download(true, "file")
			s.downloaded("content")
			var names []string
			for _, h := range s.lists["targets"].Signed.Targets["file"].Hashes {
				names = append(names, hex.EncodeToString(h)+".file")
			}
			if len(names) != len(algorithms) || len(s.sent) != 1 || !slices.Contains(names, s.sent[0]) {
				s.t.Errorf("asked for %q, want one of %q", s.sent, names)
			}
		}})
	}
	return cases
}

func keyCases() []simCase {
	cases := []simCase{
		{"keys/snapshot_does_not_meet_threshold", func(s *sim) {
			s.addKey("snapshot", s.key())
			s.addKey("snapshot", s.key())
			s.root.Signed.Roles["snapshot"].Threshold = 3
			s.publish("root")
			s.all()
			s.begin()
			s.refresh(true)
			s.signers["snapshot"] = s.signers["snapshot"][:2]
			s.all()
			s.refresh(false)
			s.holds(2, 3, 2, 2, 0)
		}},
		{"keys/snapshot_has_too_few_keys", func(s *sim) {
			s.begin()
			for range 4 {
				s.addKey("snapshot", s.key())
			}
			s.root.Signed.Roles["snapshot"].Threshold = 6
			s.publish("root", "snapshot", "timestamp")
			s.refresh(false)
			s.holds(2, 2, 0, 0, 0)
		}},
		{"keys/duplicate_keys", func(s *sim) {
			s.begin()
			s.repeatKey(9)
			s.signatures("snapshot", func(all []metadata.Signature) []metadata.Signature {
				for range 8 {
					all = append(all, all[1])
				}
				return all
			})
			s.refresh(false)
			s.trusts("snapshot", 0)
		}},
		{"keys/ours: a key that a role has nine times counts once", func(s *sim) {
			s.begin()
			s.repeatKey(9)
			s.refresh(false)
			s.trusts("snapshot", 0)
		}},
		{"keys/duplicate_sig_keyids", func(s *sim) {
			s.begin()
			good := s.last("snapshot")
			s.signatures("snapshot", func(all []metadata.Signature) []metadata.Signature { return append(all, all[0]) })
			s.refresh(false)
			s.holds(1, 1, 0, 0, 0)
			s.replace("snapshot", good)
			s.refresh(true)
		}},
		{"keys/invalid_sig_in_valid_metadata", func(s *sim) {
			s.begin()
			s.publish("timestamp")
			var other metadata.HexBytes // good, of another version
			s.signatures("timestamp", func(all []metadata.Signature) []metadata.Signature {
				other = all[0].Signature
				return all
			})
			s.addKey("timestamp", s.key())
			s.publish("root")
			for i, bad := range []metadata.HexBytes{other, {}} {
				s.publish("timestamp")
				s.signatures("timestamp", func(all []metadata.Signature) []metadata.Signature {
					all[0].Signature = bad
					return all
				})
				s.refresh(true)
				s.trusts("timestamp", int64(i+3))
			}
		}},
		{"keys/ours: a key of an unknown type", func(s *sim) {
			s.begin()
			s.addAltered("root", s.key(), func(k *metadata.Key) { k.Type = "rot13" })
			s.publish("root") // one good signature is enough for it
			s.refresh(false)
			s.holds(1, 0, 0, 0, 0)
		}},
	}
	for _, tt := range []struct {
		prefix, name string
		make         func() (crypto.Signer, error)
	}{
		{"keytype_and_scheme: ", "rsa/rsassa-pss-sha256", func() (crypto.Signer, error) { return rsa.GenerateKey(rand.Reader, 2048) }},
		{"keytype_and_scheme: ", "ecdsa/ecdsa-sha2-nistp256", func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }},
		{"keytype_and_scheme: ", "ed25519/ed25519", nil},
		{"ours: keytype as the specification writes it: ", "ecdsa-sha2-nistp256/ecdsa-sha2-nistp256", func() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }},
	} {
		cases = append(cases, simCase{"keys/" + tt.prefix + tt.name, func(s *sim) {
			s.begin()
			k := s.key()
			if tt.make != nil {
				var err error
				k, err = tt.make()
				s.check(err)
			}
			keytype, scheme, _ := strings.Cut(tt.name, "/")
			if keytype == scheme && tt.make != nil {
				s.addAltered("root", k, func(p *metadata.Key) { p.Type = keytype })
			} else {
				s.addKey("root", k)
			}
			if p := s.root.Signed.Keys[s.root.Signed.Roles["root"].KeyIDs[1]]; p.Type != keytype || p.Scheme != scheme {
				s.t.Fatalf("the key is %s/%s", p.Type, p.Scheme)
			}
			s.root.Signed.Roles["root"].Threshold = 2
			s.publish("root")
			s.refresh(true)
			s.trusts("root", 2)
			var other metadata.HexBytes
			s.signatures("root", func(all []metadata.Signature) []metadata.Signature {
				other = all[1].Signature
				return all
			})
			s.publish("root")
			good := s.last("root")
			s.signatures("root", func(all []metadata.Signature) []metadata.Signature {
				all[1].Signature = other // of the root before
				return all
			})
			s.refresh(false)
			s.trusts("root", 2)
			s.replace("root", good)
			s.refresh(true)
			s.trusts("root", 3)
		}})
	}
	return cases
}

// repeatKey lists one more key of snapshot n times, and asks for six.
func (s *sim) repeatKey(n int) {
	s.t.Helper()
	s.addKey("snapshot", s.key())
	r := s.root.Signed.Roles["snapshot"]
	for range n - 1 {
		r.KeyIDs = append(r.KeyIDs, r.KeyIDs[1])
	}
	r.Threshold = 6
	s.publish("root", "snapshot", "timestamp")
}

func quotingCases() (cases []simCase) {
	for role, escaped := range map[string]string{"?": "%3F", "#": "%23", "/delegatedrole": "%2Fdelegatedrole", "../delegatedrole": "..%2Fdelegatedrole"} {
		cases = append(cases, simCase{"quoting/unusual_role_name: " + strings.ReplaceAll(role, "/", "|"), func(s *sim) {
			s.begin()
			s.delegate("targets", metadata.DelegatedRole{Name: role, Paths: []string{"*"}})
			s.publish(role)
			s.all()
			s.download(false, "nonexistent target")
			s.requests(s.walk(escaped)...)
			s.holds(1, 2, 2, 2, 1)
		}})
	}
	for _, name := range []string{"a?b", "a#b", "100%", "100%25", "x y é", "a+b&c=d"} {
		cases = append(cases, simCase{"quoting/ours: target path " + name, func(s *sim) {
			s.begin()
			s.add("targets", name, "content")
			s.add("targets", "sub dir?/"+name, "other")
			s.all()
			s.download(true, name)
			s.downloaded("content")
			s.download(true, "sub dir?/"+name)
			s.downloaded("content", "other")
		}})
	}
	return cases
}
