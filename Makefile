# make serve    set up .venv and serve CONFIG
# make test       set up .venv and run the tests, but for the slow ones
# make test-fast  those without an engine or a cluster
# make test-rest  the slow ones
# make test-all   all of them
# make install  set up .venv alone
# ACCELERATOR=cpu|gpu|auto chooses what is installed.
CONFIG ?= configs/cluster.yaml
VENV ?= .venv
ACCELERATOR ?= auto
PYTHON ?= python3
export VENV ACCELERATOR PYTHON

.PHONY: serve test test-fast test-rest test-all install check

serve: install
	@echo "==> serve run $(CONFIG)"
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH"; set -a; . configs/ray.env; exec serve run $(CONFIG)

test:
	@scripts/install loadtest,dev
	@scripts/test standard $(PYTEST_ARGS)

test-fast:
	@scripts/install loadtest,dev
	@scripts/test fast $(PYTEST_ARGS)

test-rest:
	@scripts/install loadtest,dev
	@scripts/test rest $(PYTEST_ARGS)

test-all:
	@$(MAKE) --keep-going --no-print-directory test test-rest

check:
	@scripts/install loadtest,dev
	@scripts/check

install:
	@scripts/install loadtest
