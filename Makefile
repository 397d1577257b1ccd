# Variables: CONFIG (what `make serve` runs), ACCELERATOR=cpu|gpu|auto, PYTHON (creates the environment),
# VENV (its folder), PYTEST_ARGS.
CONFIG ?= configs/cluster.yaml
VENV ?= .venv
ACCELERATOR ?= auto
PYTHON ?= python3
export VENV ACCELERATOR PYTHON

.PHONY: help serve monitoring install check test test-fast test-rest test-ci test-all docs drawings

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | \
		awk -F '\t' '{ printf "make %-10s %s\n", $$1, $$2 }'

serve: install  ## set up .venv and serve CONFIG (configs/cluster.yaml)
	@echo "==> python -m adakv_serve.serving.run $(CONFIG)"
	@PATH="$(abspath $(VENV))/bin:$$PATH"; set -a; . configs/ray.env; exec python -m adakv_serve.serving.run $(CONFIG)

monitoring:  ## run Prometheus and, where it is installed, Grafana beside `make serve`
	@scripts/monitoring

install:  ## set up .venv for serving and load tests
	@scripts/install loadtest

check:  ## format, lint, types, and files that a program writes
	@scripts/install loadtest,dev,deploy
	@scripts/check

test:  ## the tests, without the slow ones
	@scripts/install loadtest,dev
	@scripts/test standard $(PYTEST_ARGS)

test-fast:  ## the tests that start no engine and no cluster
	@scripts/install loadtest,dev
	@scripts/test fast $(PYTEST_ARGS)

test-rest:  ## the slow tests
	@scripts/install loadtest,dev
	@scripts/test rest $(PYTEST_ARGS)

test-ci:  ## all tests but the longest
	@scripts/install loadtest,dev
	@scripts/test ci $(PYTEST_ARGS)

test-all:  ## all tests
	@scripts/install loadtest,dev
	@scripts/test all $(PYTEST_ARGS)

docs:  ## the documents as a site, in build/site
	@scripts/install loadtest,docs
	@$(VENV)/bin/python scripts/site

drawings:  ## draw the SVG files of docs/drawings
	@python3 scripts/drawings
