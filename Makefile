# `make quickstart` and `make test` need nothing but Python >= 3.11 with venv: each makes .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-lowest lint types docs package clean

quickstart: $(VENV)/.installed
	$(BIN)/gift-trl quickstart

test: $(VENV)/.installed-dev
	$(BIN)/pytest --numprocesses logical --maxprocesses 2 --dist loadfile --max-worker-restart 0

test-lowest:
	.ci/test_lowest $(PYTHON)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

types: $(VENV)/.installed-dev
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel and the sdist, and the wheel tried in an empty environment
package: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	.ci/try_wheel $(PYTHON) dist/*.whl

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gift_trl needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[deepspeed,docs,evaluation,lm-eval,quantization,dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest dist site
