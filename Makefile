# Everything a newcomer types. `make help` lists the targets; PYTHON and VENV can be overridden:
#   make test PYTHON=python3.12 VENV=/tmp/venv

PYTHON ?= python3
VENV ?= .venv
# Extra options for the torch install, e.g. an index of CPU wheels on a machine without a GPU.
TORCH_OPTIONS ?=
# Further pytest options: make test PYTEST_OPTIONS="tests/genome -x"
PYTEST_OPTIONS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.genesplice-setup
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
# Tests and benchmarks stay off the network and leave the cores to pytest's workers.
QUIET := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check format bench clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Create the virtual environment and install the tested versions, once

quickstart: $(STAMP)  ## Fine-tune, explain and publish the embedded model on real data
	$(BIN)/python -m training.quickstart

test: $(STAMP)  ## Run the whole test suite, offline
	$(QUIET) $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_OPTIONS)

check: $(STAMP)  ## Lint, formatting and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# benchmarks.enformer wants an environment of its own for its peer and is started by hand; its first lines say how.
bench: $(STAMP)  ## Run every benchmark that needs nothing else; each prints ratios and writes JSON to benchmarks/results
	@status=0; for script in $$(grep -l '__main__' benchmarks/*.py | grep -v enformer); do \
		echo "== $$script"; $(QUIET) $(BIN)/python -m benchmarks.$$(basename $$script .py) || status=1; \
	done; exit $$status

clean:  ## Remove caches and build outputs; the virtual environment and runs/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "Python 3.10 or newer is needed, and '$(PYTHON)' is not one: set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot create virtual environments: install them (Debian, Ubuntu:" >&2; \
		echo "apt-get install python3-venv) or set PYTHON to another Python 3.10 or newer." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: whichever build of that version the index offers (CPU or CUDA) is then kept.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(TORCH_OPTIONS) $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@
