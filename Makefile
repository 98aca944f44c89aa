# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo demo-scvi test lint package bench clean

demo: .venv/demo-installed  ## Train and name dictionaries of 700 real cells; under two minutes
	$(BIN)/sae-jax quickstart --workdir=runs/demo --overwrite

SCVI := runs/scvi
ZHENG = $(SAE_JAX_DATA)/data/counts/zheng_facs_pbmc_3774x16791.h5ad

demo-scvi: .venv/extract-installed  ## Real cells through a trained scVI to named features; a minute
	@test -d "$(SAE_JAX_DATA)/golden/scvi/model" || { echo 'set SAE_JAX_DATA to the data folder' >&2; exit 2; }
	$(BIN)/sae-jax-extract --model=scvi --checkpoint=$(SAE_JAX_DATA)/golden/scvi/model --h5ad=$(ZHENG) --output=$(SCVI)
	$(BIN)/sae-jax sweep --data=$(SCVI)/latent.zarr --preset=vanilla,bricken,topk_schuster --n_latents=400 --l1_weight=0.5,0.75,1,1.5 --k_percent=1,2,5,10 --learning_rate=1e-3 --input_normalization=scalar --seeds=0,1 --epochs=110 --workdir=$(SCVI)/sweep --overwrite
	$(BIN)/sae-jax quickstart --h5ad=$(ZHENG) --embedding=$(SCVI)/latent.zarr --sweep=$(SCVI)/sweep --expression_is=counts --gene_symbols=symbol --label=celltype --workdir=$(SCVI)/report --overwrite

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
	$(INSTALL) --editable '.[single-cell,browser]'
	touch $@

.venv/extract-installed: setup.py constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[single-cell,browser,extract]'
	touch $@ .venv/demo-installed

.venv/dev-installed: setup.py constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[dev]'
	touch $@ .venv/demo-installed .venv/extract-installed

# A torchvision of another torch's build breaks whatever looks for one, and no peer needs it to train.
.bench-venv/installed: bench-requirements.txt
	$(PYTHON) -m venv --clear .bench-venv
	.bench-venv/bin/python -m pip install --quiet --requirement bench-requirements.txt
	.bench-venv/bin/python -c 'import torchvision' 2>/dev/null \
	  || .bench-venv/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

clean:
	rm -rf .venv .bench-venv build dist *.egg-info runs
