# Two commands, each doing all its set-up on a fresh machine:
#   make demo   compiles real architectures, shows the rewritten graphs, checks them against eager, trains a few steps
#   make test   ruff, mypy and the tests
# What they use is installed into .venv, at the versions in constraints.txt. `VENV=/path make test` uses the environment at
# that path as it is; only this checkout is (re)installed there, editable and without its dependencies.
#   PYTHON=python3.12      the interpreter that .venv is made with (default: the first Python >= 3.11 that runs)
#   TORCH=2.11.0           another torch than that of constraints.txt, in an environment of its own
#   PYTEST_ARGS="-k plan"  what pytest runs (default: all of tests/ but what is marked slow)
#   DEMO_ARGS="--help"     arguments of the demo

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PINNED_TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH ?= $(PINNED_TORCH)
OWN_VENV := .venv$(if $(filter-out $(PINNED_TORCH),$(TORCH)),-torch-$(TORCH))
CONSTRAINTS := $(OWN_VENV)/constraints.txt
VENV ?= $(OWN_VENV)
BIN := $(VENV)/bin
CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3 python
PYTEST_ARGS ?=
DEMO_ARGS ?=

RUN_STAMP := $(OWN_VENV)/.installed-run
DEV_STAMP := $(OWN_VENV)/.installed-dev
ifeq ($(VENV),$(OWN_VENV))
READY_TO_RUN := $(RUN_STAMP)
READY_TO_TEST := $(DEV_STAMP)
else
READY_TO_RUN := reuse
READY_TO_TEST := reuse
endif

.PHONY: help demo test lint types format reuse clean

help:
	@sed -n '/^# Two commands/,/^$$/s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

demo: $(READY_TO_RUN)
	$(BIN)/python -m moecompile demo $(DEMO_ARGS)

test: lint types
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(PYTEST_ARGS)

lint: $(READY_TO_TEST)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(READY_TO_TEST)
	$(BIN)/python -m mypy

format: $(READY_TO_TEST)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# `command -v` is not enough: version managers put launchers on PATH for interpreters that are not enabled.
$(OWN_VENV)/bin/python:
	@python="$${PYTHON:-}"; \
	if [ -z "$$python" ]; then \
	  for candidate in $(CANDIDATES); do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      python="$$candidate"; break; \
	    fi; \
	  done; \
	fi; \
	if [ -z "$$python" ]; then \
	  echo "moecompile needs Python 3.11 or newer with venv; none of '$(CANDIDATES)' on PATH is." \
	       "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3 ..." >&2; \
	  exit 1; \
	fi; \
	echo "$$python -m venv $(OWN_VENV)"; \
	"$$python" -m venv $(OWN_VENV)

# torch goes first, by exact version, so that the build which pip's settings offer (a CPU wheel, say) is the one that stays.
$(RUN_STAMP): $(OWN_VENV)/bin/python pyproject.toml constraints.txt
	@# another torch asks for other versions of what it needs itself: then only what the tests compare with stays pinned
	sed $(if $(filter $(PINNED_TORCH),$(TORCH)),-n p,-nE '/^(transformers|tokenizers|pytest|ruff|mypy)==/p') constraints.txt > $(CONSTRAINTS)
	$(OWN_VENV)/bin/python -m pip install --quiet "torch==$(TORCH)" "setuptools>=77" -c $(CONSTRAINTS)
	$(OWN_VENV)/bin/python -m pip install --quiet --no-build-isolation -c $(CONSTRAINTS) -e '.[test]'
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(OWN_VENV)/bin/python -m pip install --quiet --no-build-isolation -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

reuse:
	@test -x $(BIN)/python || { echo "VENV=$(VENV): no environment there ($(BIN)/python is missing)." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .

clean:
	rm -rf .venv .venv-torch-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
