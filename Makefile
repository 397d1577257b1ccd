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
	@echo "==> pytest: two files at a time, one thread each"
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --ignore tests/system $(PYTEST_ARGS)
	@echo "==> pytest: the running application"
	@$(VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/system

check:
	@scripts/install loadtest,dev
	@scripts/check

install:
	@scripts/install loadtest
