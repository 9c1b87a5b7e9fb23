# Everything from a fresh clone: `make quickstart` or `make test`. Needs Python 3.11 and a C++ compiler.
SHELL := bash
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup quickstart real test lint docs-check site clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 14

setup:  ## install everything into .venv (QARL_EXTRA=cpu|gpu overrides the choice)
	@launch/setup.sh

quickstart: setup  ## train the sorting task; options: make quickstart ARGS="train.steps=12"
	@$(BIN)/qarl train configs/quickstart.yaml $(ARGS)

real: setup  ## train SmolLM2-135M on arithmetic; options as for quickstart
	@$(BIN)/qarl train configs/smollm2_chain_sum.yaml $(ARGS)

lint: setup  ## ruff (rules and format) and mypy
	@echo "lint: ruff check, ruff format --check, mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint  ## lint, then the tests (slow ones: .venv/bin/pytest -m slow)
	@echo "test: pytest, in two processes"
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

docs-check: setup  ## run the commands that README and docs show, in a fresh clone
	@$(BIN)/python -m tests.docs_check $(ARGS)

site: setup  ## build the pages as a site, into build/site
	@$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove build artefacts and caches; runs and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -not -path './runs/*' -prune -exec rm -rf {} +
