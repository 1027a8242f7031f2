# `make demo` and `make test` do all set-up on a machine with Python >= 3.10 and pip; see `make help`.

PYTHON ?= python3
VENV ?= .venv
# auto: use the torch of $(PYTHON) when it drives a GPU; present: use it in any case; pinned: install our own.
TORCH ?= auto
WORKERS ?= 2
PYTEST_ARGS ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

RUN := $(VENV)/bin
SETUP := pyproject.toml constraints.txt .ci/make_env.py
TREE := build/typecheck

.PHONY: help demo test lint types format clean

help:  ## Print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) (auto, present, pinned) WORKERS=$(WORKERS) PYTEST_ARGS="

$(VENV)/demo.stamp: $(SETUP)
	$(PYTHON) .ci/make_env.py $(VENV) --extras models --torch $(TORCH)
	@touch $@

$(VENV)/test.stamp: $(SETUP)
	$(PYTHON) .ci/make_env.py $(VENV) --extras models,test,dev --torch $(TORCH)
	@touch $@ $(VENV)/demo.stamp

demo: $(VENV)/demo.stamp  ## Set up, then run examples/quickstart.py
	$(RUN)/python examples/quickstart.py

test: lint  ## Set up, check style and types, then run the whole test suite
	$(RUN)/python -m pytest -p no:cacheprovider -n $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/test.stamp types  ## Check style (ruff) and types (mypy)
	$(RUN)/python -m ruff check .
	$(RUN)/python -m ruff format --check .

# mypy cannot see that passes/ and kernels/ are installed inside mmi_compile, so it gets a tree of links that shows it;
# errors are printed with the paths of the repository.
types: $(VENV)/test.stamp
	@rm -rf $(TREE) && mkdir -p $(TREE)/mmi_compile
	@cd $(TREE)/mmi_compile && ln -s ../../../mmi_compile/* ../../../passes ../../../kernels .
	MYPYPATH=$(TREE) $(RUN)/python -m mypy -p mmi_compile | sed -E -e 's,^$(TREE)/,,' -e 's,^mmi_compile/(passes|kernels)/,\1/,'

format: $(VENV)/test.stamp  ## Sort imports and format all code
	$(RUN)/python -m ruff check --select I --fix .
	$(RUN)/python -m ruff format .

clean:  ## Remove the environment, caches and build folders
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
