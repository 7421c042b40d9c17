# Everything runs on one Linux machine without a GPU; `make help` lists the targets.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install test upstream demo lint wheel clean

VENV ?= .venv
ARGS ?=
PROMPT ?=
MODEL ?=
# Other versions than the pinned ones, each best in a VENV of its own.
VLLM ?=
MLX_LM ?=
export PROMPT MODEL VLLM MLX_LM

# 3.11 first: it is the version for which every wheel exists.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	"$$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v "$$name"; break; }; done)

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12 VENV=.venv ARGS='-k wire -x' PROMPT='...' MODEL=path"
	@echo "  VLLM=0.31.0 MLX_LM=0.32.0 VENV=.venv-old"

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer, with venv, is needed." >&2; exit 1; }
	@echo "Creating $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -m venv "$(VENV)"

install: $(VENV)/bin/python ## Create the virtual environment and install both halves
	@"$(VENV)/bin/python" .ci/install_cpu.py

test: install ## Run the tests (ARGS are passed to pytest)
	"$(VENV)/bin/python" -m tests $(ARGS)

upstream: install ## Run vLLM's own API tests, too slow for each day (ARGS: parts of paths)
	@"$(VENV)/bin/python" -m pip install --quiet --no-build-isolation --editable '.[upstream]'
	"$(VENV)/bin/python" -m tests.upstream $(ARGS)

demo: install ## Hand one request from vLLM to MLX and show it (PROMPT, MODEL)
	@set --; \
	if [ -n "$$PROMPT" ]; then set -- "$$@" --prompt "$$PROMPT"; fi; \
	if [ -n "$$MODEL" ]; then set -- "$$@" --model "$$MODEL"; fi; \
	exec "$(VENV)/bin/mac-decode" demo "$$@"

lint: install ## Check style, types, who imports whom, and the generated tables
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/ruff" format --check .
	"$(VENV)/bin/mypy"
	"$(VENV)/bin/mypy" --platform darwin
	"$(VENV)/bin/lint-imports"
	"$(VENV)/bin/python" .ci/options.py
	"$(VENV)/bin/python" -m bench.model_table
	"$(VENV)/bin/python" -m bench.table --check
	"$(VENV)/bin/python" -m bench.plan

wheel: install ## Build dist/ and try the wheel in a bare environment
	"$(VENV)/bin/python" .ci/wheel.py

clean: ## Remove the virtual environment, build output and tool caches
	rm -rf "$(VENV)" build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
