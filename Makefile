# The two commands of the README are `make demo` and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Hundreds of programs start in the tests; each would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-unit test-slow test-cluster test-cluster-all fuzz test-faults check format golden clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/train.stamp  ## fine-tune a real model on real text on this machine
	$(BIN)/zerofit demo

test: $(VENV)/dev.stamp  ## all tests that this machine can run
	$(BIN)/pytest -n 2 --dist loadfile tests/unit
	$(BIN)/pytest -n 2 --dist loadgroup -m 'not slow and not alone' tests/integration tests/cluster
	$(BIN)/pytest -m 'alone and not slow' $$(grep -l mark.alone tests/integration/test_*.py)

test-unit: $(VENV)/dev.stamp  ## the quick tests alone
	$(BIN)/pytest -n 2 --dist loadfile tests/unit

test-slow: $(VENV)/dev.stamp  ## the tests that `make test` leaves out: the rest of the grid, NVMe, all trackers
	$(BIN)/pytest -m slow tests/integration
	$(BIN)/pip install --quiet -c constraints.txt -e '.[trackers]'
	$(BIN)/pytest tests/integration/test_no_telemetry.py

test-cluster: $(VENV)/dev.stamp  ## the tests on virtual hosts; installs Debian packages as root
	if [[ $$(id -u) == 0 ]]; then tests/cluster/install.sh; fi
	$(BIN)/pytest -m 'not slow' tests/cluster

test-cluster-all: $(VENV)/dev.stamp  ## the same and those that take minutes
	if [[ $$(id -u) == 0 ]]; then tests/cluster/install.sh; fi
	$(BIN)/pytest tests/cluster

fuzz: $(VENV)/dev.stamp  ## 10,000 broken files and outputs of programs: no traceback, no hang
	ZEROFIT_FUZZ_EACH=500 $(BIN)/pytest -n 2 tests/unit/test_fuzz.py

# Rows that benchmarks/faults.jsonl has are not measured again: delete it, or some of its lines.
test-faults: $(VENV)/dev.stamp  ## harm real runs in every way and write the table of docs/reliability.md
	if [[ $$(id -u) == 0 ]]; then tests/cluster/install.sh; fi
	touch benchmarks/faults.jsonl
	ZEROFIT_FAULT_ROWS=$(CURDIR)/benchmarks/faults.jsonl \
	  $(BIN)/pytest -m faults tests/integration tests/cluster
	$(BIN)/python benchmarks/make_fault_table.py

check: $(VENV)/dev.stamp  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp  ## rewrite the sources as ruff formats them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: $(VENV)/dev.stamp  ## rewrite recipes/, ds_configs/ and the generated pages; review the diff
	$(BIN)/python benchmarks/make_recipes.py
	$(BIN)/python benchmarks/make_figure4.py
	$(BIN)/python benchmarks/make_study.py
	$(BIN)/python tests/golden/sbatch_cases.py
	$(BIN)/python benchmarks/accuracy.py --markdown > benchmarks/accuracy.md

clean:  ## remove the environment and caches, no results
	rm -rf $(VENV) build ./*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("zerofit needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/train.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[train]'
	touch $@

$(VENV)/dev.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[train,qlora,mpi,dev]'
	touch $@
