PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
# A fixed number of workers with one thread each: more of either only makes small CPU tests fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test pytest lint format test-slow test-floor constraints clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

# Threads that spin while they wait are many times slower as soon as anything else wants the cores.
demo: $(VENV)/installed-demo ## set up, then run `dynmoe demo`
	OMP_WAIT_POLICY=passive $(BIN)/dynmoe demo --overwrite

test: lint pytest ## set up, then run the linter and the fast tests

pytest: $(VENV)/installed-dev ## the fast tests alone
	$(PYTEST)

lint: $(VENV)/installed-dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-dev ## fix what can be fixed of both
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-slow: $(VENV)/installed-dev ## the tests marked slow
	$(PYTEST) -m slow

test-floor: ## the fast tests on the oldest supported versions
	$(MAKE) pytest VENV=.venv-floor CONSTRAINTS=constraints-floor.txt

constraints: ## pin the newest versions in constraints.txt; torch stays as it is
	$(PYTHON) -m venv --clear .venv-constraints
	.venv-constraints/bin/pip install -qq "$$(grep '^torch==' constraints.txt)" --editable '.[dev]'
	{ grep '^#' constraints.txt; .venv-constraints/bin/pip freeze --exclude-editable | sed 's/+.*//'; } > .venv-constraints/new
	mv .venv-constraints/new constraints.txt
	rm -rf .venv-constraints

clean: ## remove environments, caches and builds, but nothing a run has written
	rm -rf .venv .venv-floor .venv-constraints .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed-%: pyproject.toml $(CONSTRAINTS)
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes a few minutes."
	$(BIN)/pip install -qq --constraint $(CONSTRAINTS) --editable '.[$*]'
	@touch $@
