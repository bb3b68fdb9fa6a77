# Two commands matter: `make quickstart` and `make test`. Each sets up what it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .peers

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all check format peers oldest lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode -e '.[all,dev]' -c constraints.txt
	@touch $@

install: $(STAMP)  ## set up .venv (done by the other targets as well)

quickstart: $(STAMP)  ## scenes -> shards -> pretraining -> captions, VQA -> retrieval numbers and a report
	$(BIN)/pairstream quickstart

# Explanations and serving in processes of their own: with the native libraries of all extras in one process
# (numba, onnxruntime, openvino, torch) it crashed in two runs of three, without a trace.
test: $(STAMP)  ## the default tests: offline, CPU
	$(BIN)/python -m pytest -q --ignore=tests/unit/explain --ignore=tests/unit/serve
	$(BIN)/python -m pytest -q tests/unit/explain
	$(BIN)/python -m pytest -q tests/unit/serve

test-all: $(STAMP)  ## every test that this machine can run, slow ones included
	$(BIN)/python -m pytest -q -m 'not gpu'

check: $(STAMP)  ## ruff, pyright, import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

format: $(STAMP)  ## let ruff format and mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

peers: $(STAMP)  ## set up .peers, the rivals' own environment for benchmarks/data_loading.py
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@grep -v '^webdataset==' constraints.txt > $(PEERS)/constraints.txt  # open_clip's loader needs an older one
	VIRTUAL_ENV=$(PEERS) $(BIN)/uv pip install --quiet --compile-bytecode -c $(PEERS)/constraints.txt \
	  open_clip_torch clip-benchmark pandas torch webdataset==0.2.86

oldest: $(STAMP)  ## set up .oldest, the oldest transformers that pyproject allows, for tests/parity
	$(BIN)/uv pip install --quiet --target .oldest --no-deps \
	  transformers==5.0.0 'tokenizers<=0.23.0' 'huggingface-hub<2' typer-slim

lock:  ## refresh the pins in constraints.txt
	@test -x $(BIN)/uv || ($(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet uv)
	$(BIN)/uv pip compile --quiet --universal --upgrade --all-extras --no-annotate --no-header \
	  --no-emit-index-url --no-emit-find-links pyproject.toml -o constraints.txt

clean:  ## remove the environments and caches (runs/ stays)
	rm -rf $(VENV) $(PEERS) .oldest .pytest_cache .ruff_cache .hypothesis
