# SPDX-License-Identifier: Apache-2.0
#
# "make" alone prints the list. Everything CI does is a target here.

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS   += --no-print-directory

GO   ?= go
TOOL := $(GO) tool -modfile=tools/go.mod
# Tests of these programs are in their folders; a program that does not
# exist yet is left out.
PROGRAMS := klatch klatchd klatch-loader klatch-server klatch-fleet klatch-forge
HAVE     := $(foreach p,$(PROGRAMS),$(if $(wildcard cmd/$(p)/*.go),$(p)))

# Before the first tag the commits are counted, so that versions still sort.
VERSION := $(shell git describe --tags --dirty 2>/dev/null || \
	{ n=$$(git rev-list --count HEAD 2>/dev/null) && echo "v0.0.0-$$n-g$$(git describe --always --dirty)"; } || echo v0.0.0-unknown)
# A Debian version starts with a digit and has no second part after a dash.
DEB_VERSION := $(shell echo '$(VERSION)' | sed -E 's/^v//; s/-/+/; s/-/./g')
# When the source was committed: a machine's clock is never before it.
BUILT   := $(shell git log -1 --format=%cI 2>/dev/null)
LDFLAGS := -s -w -X main.version=$(VERSION) -X main.built=$(BUILT)

# Where each test step leaves its outcomes; CI adds them up.
RESULTS ?= bin/results

.PHONY: help
help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

.PHONY: build
build: ## the six programs into bin/
	@mkdir -p bin
	@for p in $(HAVE); do \
		CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/$$p ./cmd/$$p; \
	done
	@echo "bin/: $(or $(HAVE),no program yet), version $(VERSION)"

.PHONY: forge-pkcs11
forge-pkcs11: ## klatch-forge with PKCS#11 tokens; needs a C compiler
	@mkdir -p bin
	CGO_ENABLED=1 $(GO) build -tags pkcs11 -trimpath -ldflags '$(LDFLAGS)' -o bin/klatch-forge-pkcs11 ./cmd/klatch-forge

.PHONY: fleet-pkcs11
fleet-pkcs11: ## klatch-fleet with PKCS#11 tokens; needs a C compiler
	@mkdir -p bin
	CGO_ENABLED=1 $(GO) build -tags pkcs11 -trimpath -ldflags '$(LDFLAGS)' -o bin/klatch-fleet-pkcs11 ./cmd/klatch-fleet

# count runs go test with the given arguments, shows it to a person and
# leaves the outcomes in a file. $(1) is the step, $(2) the arguments.
define count
	@mkdir -p bin $(RESULTS)
	@$(GO) -C tools build -o ../bin/testcount ./testcount
	@$(GO) test -json $(2) | bin/testcount -save $(RESULTS)/$(1).json
endef

# Packages with files that need a build tag.
tagged = $(shell grep -rlE '^//go:build .*\b$(1)\b' --include='*.go' . 2>/dev/null | xargs -r -n1 dirname | sort -u)

.PHONY: test
test: ## tiers 1 and 2, shuffled; add T=TestName or P=./internal/... to narrow
	$(call count,test,-shuffle=on $(if $(T),-run '$(T)') $(or $(P),./...))
	@$(GO) -C tools test -count=1 -json ./... | bin/testcount -save $(RESULTS)/tools.json

.PHONY: race
race: ## the same with the race detector; needs a C compiler
	$(call count,race,-race -shuffle=on $(or $(P),./...))

.PHONY: system
system: ## tier 3: all programs as processes
	$(call count,system,-tags system -timeout 20m $(or $(P),./...))

.PHONY: vm
vm: ## tier 4: real kernels in QEMU
	@if [ -z '$(call tagged,vm)' ]; then echo "no test needs a virtual machine yet"; fi
	$(if $(call tagged,vm),$(call count,vm,-tags vm -timeout 40m -p 1 $(call tagged,vm)))

.PHONY: lint
lint: ## golangci-lint, import table, root dependencies, shell scripts
	$(TOOL) golangci-lint run ./...
	$(GO) test -run 'TestImportTable|TestRoot|TestLicenseLines|TestFileLength|TestNothingMadeIsKept|TestMarkdownLinks|TestFeatures' .
	@if [ -f cmd/klatch-loader/depaware.txt ]; then \
		$(TOOL) depaware --check --goos=linux klatch/cmd/klatch-loader; fi
	@scripts=$$(git ls-files | xargs -r awk 'FNR == 1 { if (/^#!.*[\/ ](ba)?sh/) print FILENAME; nextfile }'); \
	if [ -z "$$scripts" ]; then :; elif command -v shellcheck >/dev/null; then shellcheck $$scripts; \
	else echo "lint: shellcheck is not installed, shell scripts not checked: tools/deps lint" >&2; exit 1; fi

.PHONY: depaware
depaware: ## write the list of what the root program links
	$(TOOL) depaware --update --goos=linux klatch/cmd/klatch-loader

.PHONY: gen
gen: ## generated code, man pages, references, golden files
	$(GO) generate ./...
	$(GO) test -run TestImportTableIsDocumented . -args -update

.PHONY: gen-diff
gen-diff: ## fails when generated files are not up to date
	@state() { git status --porcelain; git diff; }; \
	before=$$(state); $(MAKE) gen; after=$$(state); \
	if [ "$$before" != "$$after" ]; then git --no-pager diff --stat; \
	echo 'gen-diff: make gen changes files; commit what it writes' >&2; exit 1; fi

.PHONY: deb
deb: build ## Debian packages into dist/out/
	@mkdir -p dist/out
	@rm -f dist/out/*.deb
	@for f in $(wildcard dist/nfpm/*.yaml); do \
		VERSION='$(DEB_VERSION)' ARCH=$$($(GO) env GOARCH) \
		SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || echo 0) \
		$(TOOL) nfpm package --config $$f --packager deb --target dist/out/; \
	done

.PHONY: demo
demo: ## from a fix to a reported livepatch on a real kernel; KEEP=1 leaves it running
	@tools/deps demo
	@$(MAKE) build deb
	bin/klatch-forge demo $(if $(KEEP),--keep)

.PHONY: fuzz
fuzz: ## one fuzz target for a minute: make fuzz T=FuzzName
	@test -n '$(T)' || { echo 'say which: make fuzz T=FuzzName'; exit 2; }
	@dir=$$(grep -rl --include='*_test.go' 'func $(T)(' . | head -n1 | xargs -r dirname); \
	test -n "$$dir" || { echo 'no fuzz target is called $(T)'; exit 2; }; \
	$(GO) test -run '^$$' -fuzz '^$(T)$$' -fuzztime 1m -fuzzminimizetime 2s "$$dir"

.PHONY: fuzz-all fuzz-readers
fuzz-all: ## every fuzz target for a minute, two at a time; prints a table
	@mkdir -p bin
	@$(GO) -C tools build -o ../bin/fuzzall ./fuzzall
	@bin/fuzzall

fuzz-readers: ## the readers of strangers' bytes for a minute each, the others for some seconds, eight minutes at most
	@mkdir -p bin
	@$(GO) -C tools build -o ../bin/fuzzall ./fuzzall
	@bin/fuzzall -readers -time $(or $(FUZZTIME),1m) -others 3s -within $(or $(FUZZWITHIN),7m)

.PHONY: attacks attacks-check
attacks: ## the attack table in docs/, from the outcomes of: make test system vm; WITHOUT=V where no vm ran
	@mkdir -p bin
	@$(GO) -C tools build -o ../bin/attacktable ./attacktable
	@bin/attacktable -write docs/reference/attacks.md $(if $(WITHOUT),-without $(WITHOUT)) $(wildcard $(RESULTS)/*.json)

attacks-check: ## fails when fewer attacks ran than the table says, or one was accepted
	@mkdir -p bin
	@$(GO) -C tools build -o ../bin/attacktable ./attacktable
	@bin/attacktable -check docs/reference/attacks.md $(wildcard $(RESULTS)/*.json)

.PHONY: mutation
mutation: ## take out each verification step; the table goes to docs/explanation/mutation-check.md
	@mkdir -p bin
	@$(GO) -C tools build -o ../bin/mutation ./mutation
	@bin/mutation -write docs/explanation/mutation-check.md

.PHONY: mutate
mutate: ## take out the checks of a package one at a time: make mutate P=./internal/evidence
	@test -n '$(P)' || { echo 'say which: make mutate P=./internal/evidence'; exit 2; }
	@mkdir -p bin
	@$(GO) -C tools build -o ../bin/mutate ./mutate
	@bin/mutate $(P)

.PHONY: bench
bench: ## benchmarks ten times, compared with bench/
	@mkdir -p bin
	$(GO) test -run '^$$' -bench '$(or $(T),.)' -benchmem -count 10 $(or $(P),./...) | tee bin/bench.txt
	$(TOOL) benchstat $(firstword $(BASE) $(wildcard bench/*.txt)) bin/bench.txt

.PHONY: ci
ci: lint race system gen-diff vm attacks-check ## what CI runs

.PHONY: changes
changes: ## checks that changes/ has a file, or that a commit says no-note
	@base=$$(git merge-base HEAD $(or $(BASE),main)); \
	if git diff --name-only "$$base" -- changes | grep -vE 'changes/(README|TEMPLATE)\.md' | grep -q .; then exit 0; fi; \
	if git log "$$base..HEAD" --format=%B | grep -qiE '^no-note'; then exit 0; fi; \
	echo 'changes: no file in changes/ and no commit says "no-note: reason"; see changes/README.md' >&2; exit 1

.PHONY: clean
clean: ## remove what was built
	rm -rf bin dist/out
