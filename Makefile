# The two commands: `make reproduce` and `make test`. Both create .venv first; a second call finds it ready.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROFILE ?= lite
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test lint format lock clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## create .venv with every extra, at the versions of constraints.txt

# torch goes first and exactly pinned: a CPU build that pip can already see then satisfies every later, looser request.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "k25lite needs Python 3.11 or newer (transformers does); try: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[game,ray,dev]'
	@touch $@

reproduce: setup  ## run every notebook (PROFILE=lite, SEEDS=3) and build the scorecard
	$(BIN)/k25lite reproduce --profile $(PROFILE) $(if $(SEEDS),--seeds $(SEEDS))

# A file of tests stays in one process: its tests share what is slow to make. In order, notebooks come early, which take longest.
test: setup lint  ## lint, type-check and run the whole test suite
	$(BIN)/pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup  ## format the code and the notebooks, and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# NVIDIA's packages follow from the build of torch that is installed and are left to it.
lock: setup  ## resolve constraints.txt anew from pyproject.toml
	$(BIN)/pip install --quiet uv
	@echo "# Exact versions of everything the project installs, for Python 3.11 and newer. Made by: make lock" > constraints.tmp
	echo "$(TORCH)" | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra game --extra ray --extra dev \
	    --no-header --no-annotate pyproject.toml --constraint - | grep -vE '^(nvidia-|cuda-|triton)' >> constraints.tmp
	mv constraints.tmp constraints.txt

clean:  ## remove the environment and everything generated
	rm -rf $(VENV) runs data/generated
