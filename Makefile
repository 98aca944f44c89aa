# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test lint package clean

demo: .venv/demo-installed  ## Train and name dictionaries of 700 real cells; under two minutes
	$(BIN)/sae-jax quickstart --workdir=runs/demo --overwrite

test: .venv/dev-installed  ## Everything that CI tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

package: .venv/dev-installed  ## Build the wheel and import every module from an installation of it
	$(BIN)/python .ci/packaging.py

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

.venv/demo-installed: setup.py constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[single-cell]'
	touch $@

.venv/dev-installed: setup.py constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[dev]'
	touch $@ .venv/demo-installed

clean:
	rm -rf .venv build dist *.egg-info runs
