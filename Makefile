# `make run` and `make test` need Python 3.11 to 3.13, make and a C compiler; the rest they install.

PYTHON ?= python3
UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
UV = $(shell command -v uv || echo .tools/bin/uv)
MINUTES ?= 100
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run test lint start-time lock demo-data demo-train demo-eval bench-engine

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: requirements-dev.lock pyproject.toml
	@command -v uv >/dev/null || test -x .tools/bin/uv || \
		$(PYTHON) -m pip install --quiet --disable-pip-version-check --target .tools uv==$(UV_VERSION)
	@test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) $(VENV)
	$(UV) pip sync --quiet --compile-bytecode --python $(BIN)/python requirements-dev.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@$(BIN)/python -m compileall -q serve_app
	@touch $@

run: $(VENV)/.installed ## the service on the demo model, with its page (ARGS: t5-serve run --help)
	@$(BIN)/t5-serve run $(ARGS)

test: lint ## everything: lint, types, unit and integration tests
	$(BIN)/pytest $(ARGS)

lint: $(VENV)/.installed ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

start-time: $(VENV)/.installed ## seconds from start to the first summary
	@$(BIN)/t5-serve run --once

lock: $(VENV)/.installed ## both lock files from pyproject.toml
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" --extra dev --extra training --extra bench \
		pyproject.toml --output-file requirements-dev.lock
	$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock" --constraint requirements-dev.lock \
		pyproject.toml --output-file requirements.lock

demo-data: $(VENV)/.installed ## the demo model's data and vocabulary (Debian: uses apt's package lists)
	$(BIN)/python -m training.data
	$(BIN)/python -m training.tokenizer

demo-train: $(VENV)/.installed ## train the demo model for MINUTES, resuming, and put it into the package
	$(BIN)/python -m training.train --minutes $(MINUTES)
	$(BIN)/python -m training.export
	$(BIN)/python -m training.curve

demo-eval: $(VENV)/.installed ## judge the demo model in the package
	$(BIN)/python -m training.evaluate

bench-engine: $(VENV)/.installed ## the engine against transformers and CTranslate2
	$(BIN)/python -m bench.engine
