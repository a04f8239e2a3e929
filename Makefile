# Every target makes the environment it needs; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
BIN := $(VENV)/bin
PIP = $(PY) -m pip install --quiet --disable-pip-version-check --no-deps
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# A machine with a GPU: make setup CUDA=1 (once; the other targets then use that environment).
CUDA ?=
# Test processes at the same time, for tests that start neither Ray nor vLLM.
JOBS ?= 2
# Extra arguments for pip, for example where the CPU build of torch is.
PIP_ARGS ?=
LOCK := requirements/$(if $(CUDA),cuda,cpu).lock.txt
STAMP := $(VENV)/.learnonce-setup
# An environment that was set up once for CUDA stays so until its lock changes.
ifneq (,$(wildcard $(VENV)/.learnonce-cuda))
LOCK := requirements/cuda.lock.txt
endif

export LEARNONCE_MODEL_HOME ?= $(CURDIR)/.models
export HF_HUB_OFFLINE ?= $(if $(CUDA),,1)

.PHONY: help setup model demo fmt lint type imports docs docs-check test test-fast test-ray test-engine test-slow bench check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

setup: $(STAMP) ## make the virtual environment from the lock (CUDA=1 for GPU machines; PIP_ARGS=... for pip)

$(STAMP): $(LOCK) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "learnonce needs Python 3.11 ($(PYTHON) not found): make setup PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(PY) || { echo "==> making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> installing $$(grep -c '==' $(LOCK)) pinned packages from $(LOCK) (about 3 GB, some minutes)"
	@# pip finds torch's CPU build as this machine is set up to; uv unpacks the rest twice as fast, and pip is its fallback.
	@$(PIP) $(PIP_ARGS) "$$(grep '^uv==' $(LOCK))" "$$(grep '^torch==' $(LOCK))"
	@$(BIN)/uv pip install --quiet --python $(PY) --no-deps --compile-bytecode -r $(LOCK) || $(PIP) $(PIP_ARGS) -r $(LOCK)
	@$(PIP) --no-build-isolation --editable .
	@$(PY) requirements/check.py $(if $(findstring cuda,$(LOCK)),cuda,cpu)
	@$(if $(findstring cuda,$(LOCK)),touch $(VENV)/.learnonce-cuda,true)
	@touch $@

model: $(STAMP) ## convert the embedded model once into $(LEARNONCE_MODEL_HOME)
	@$(PY) -m cluster.model

demo: model ## the whole story: start, learn, ask, print the table, stop
	@$(BIN)/learnonce demo

fmt: $(STAMP) ## format the code
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: $(STAMP) ## ruff, codespell
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/codespell

type: $(STAMP) ## mypy, strict
	@$(BIN)/mypy

imports: $(STAMP) ## the rooms import downwards only
	@$(BIN)/lint-imports

docs: $(STAMP) ## write the generated pages
	@$(PY) docs/generate.py

docs-check: $(STAMP) ## fail if a generated page is stale
	@$(PY) docs/generate.py --check

test-fast: $(STAMP) ## tests that start neither Ray nor vLLM, in JOBS processes
	@$(BIN)/pytest -n $(JOBS) --dist loadfile -m "not ray and not engine and not gpu and not slow"

test-ray: $(STAMP) ## tests that start a local Ray cluster with the no-op engine
	@$(BIN)/pytest -m "ray and not engine and not slow"

test-engine: model ## tests on real vLLM with the embedded model
	@$(BIN)/pytest -m "engine and not gpu and not slow"

test: test-fast model ## the whole suite: what starts engines or Ray one after the other
	@$(BIN)/pytest -m "(ray or engine) and not gpu and not slow"

test-slow: $(STAMP) ## bounded, but long: a million hostile inputs, half an hour of mixed load
	@$(BIN)/pytest -s -m "slow and not gpu"

bench: model ## time to first token, the store and its floors: writes bench-ttft.json, bench-store.json
	@$(BIN)/learnonce bench ttft --json bench-ttft.json
	@$(BIN)/learnonce bench store --json bench-store.json

check: lint type imports docs-check test ## everything that CI checks

clean: ## remove what make made (the environment and the models stay)
	@rm -rf dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
