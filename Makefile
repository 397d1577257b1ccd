# make serve    set up .venv and serve CONFIG
# make test     set up .venv and run the tests
# make install  set up .venv alone
# ACCELERATOR=cpu|gpu|auto chooses what is installed.
CONFIG ?= configs/cluster.yaml
VENV ?= .venv
ACCELERATOR ?= auto
PYTHON ?= python3
export VENV ACCELERATOR PYTHON

.PHONY: serve test install check

serve: install
	@echo "==> serve run $(CONFIG)"
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH"; set -a; . configs/ray.env; exec serve run $(CONFIG)

test:
	@scripts/install loadtest,dev
	@echo "==> pytest"
	@$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

check:
	@scripts/install loadtest,dev
	@scripts/check

install:
	@scripts/install loadtest
