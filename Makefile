# Two commands do everything on a fresh machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# a stamp per set of extras, so that a second run installs nothing
STAMP = $(VENV)/.installed-

.PHONY: demo test test-slow fuzz lint docs models bench clean
.DEFAULT_GOAL := demo

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "glcan-fx needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "==> creating $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(STAMP)demo: $(VENV)/bin/python pyproject.toml
	@echo "==> installing glcan-fx and what it needs (torch is large: about two minutes)"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(STAMP)test: $(VENV)/bin/python pyproject.toml
	@echo "==> installing glcan-fx with test extras (torch is large: about two minutes)"
	$(BIN)/python -m pip install --quiet --editable '.[test,frameworks]'
	@touch $@ $(STAMP)demo

$(STAMP)lint: $(STAMP)test
	@echo "==> installing linters"
	$(BIN)/python -m pip install --quiet --editable '.[test,frameworks,lint]'
	@touch $@

$(STAMP)docs: $(STAMP)demo
	@echo "==> installing what builds the documentation"
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

demo: $(STAMP)demo
	@echo "==> training a small detector twice: backpropagation and glcan_fx"
	$(BIN)/glcan-fx demo $(ARGS)

test: $(STAMP)test
	@echo "==> running the tests"
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(STAMP)test
	@echo "==> running the slow tests"
	$(BIN)/python -m pytest -m slow $(ARGS)

fuzz: $(STAMP)test
	@echo "==> compiling random models (at most an hour)"
	$(BIN)/python -W ignore tests/fuzz.py $(ARGS)

lint: $(STAMP)lint
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(STAMP)docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

models: $(STAMP)test
	@echo "==> writing docs/models.md: torchvision's networks (about ten minutes)"
	$(BIN)/python docs/make_models.py --all

bench: $(STAMP)test
	@echo "==> writing docs/tracing.md: times, and other tracers (about twenty minutes)"
	$(BIN)/python docs/bench_tracing.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
