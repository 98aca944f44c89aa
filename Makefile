# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test lint package bench clean

demo: .venv/demo-installed  ## Train and name dictionaries of 700 real cells; under two minutes
	$(BIN)/sae-jax quickstart --workdir=runs/demo --overwrite

test: .venv/dev-installed  ## Everything that CI tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

package: .venv/dev-installed  ## Build the wheel and import every module from an installation of it
	$(BIN)/python .ci/packaging.py

bench: .venv/demo-installed .bench-venv/installed  ## Training beside other libraries; BENCH=--quick
	$(BIN)/python -m experiments.benchmarks.training $(BENCH)

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

.venv/demo-installed: setup.py constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[single-cell]'
	touch $@

.venv/dev-installed: setup.py constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[dev]'
	touch $@ .venv/demo-installed

# A torchvision of another torch's build breaks whatever looks for one, and no peer needs it to train.
.bench-venv/installed: bench-requirements.txt
	$(PYTHON) -m venv --clear .bench-venv
	.bench-venv/bin/python -m pip install --quiet --requirement bench-requirements.txt
	.bench-venv/bin/python -c 'import torchvision' 2>/dev/null \
	  || .bench-venv/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf .venv .bench-venv build dist *.egg-info runs
