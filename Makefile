# Every target sets itself up: it makes .venv, installs what it needs, and does so again only when pyproject.toml changes.
# Needs Python >= 3.10 and make. Another interpreter: make test PYTHON=python3.12. One test alone: make test PYTEST_ARGS="-k NAME".
# Two processes with one thread each run the tests in three quarters of the time of one process.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-all mutants bench lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

demo: $(VENV)/.installed-demo  ## train on handwritten digits and print what the network sees as similar
	$(BIN)/python -m lightning_netsim fit --config configs/digits.yaml

test: $(VENV)/.installed-test  ## run the tests and the examples in docstrings
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test  ## run all of that and the tests marked slow
	$(BIN)/python -m pytest --slow $(PYTEST_ARGS)

mutants: $(VENV)/.installed-test  ## break the package on purpose, line by line, and see whether the tests notice (hours)
	$(BIN)/python tests/run_mutants.py

bench: $(VENV)/.installed-bench  ## measure time, memory and recall beside other packages (about 20 minutes); writes docs/results/benchmarks.md
	$(BIN)/python benchmarks/write_results.py

lint: $(VENV)/.installed-dev  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## mend style and formatting where it can be done by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, caches and build products; what runs wrote stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "lightning_netsim needs Python >= 3.10: make PYTHON=/path/to/python3.10"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(INSTALL) -e ".[$*]"
	@touch $@
