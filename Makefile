# make setup | run | test | lint: each does from a clean clone what it needs first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: setup run test cluster lint clean
.DELETE_ON_ERROR:

setup: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; write make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[deepspeed,fp8,report,test,lint]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps timm==1.0.31  # a reference of the tests; its torchvision is not needed
	touch $@

# Prepares the embedded corpus (a no-op when it is there), pretrains the default, draws its loss curve, lets it speak.
run: setup
	$(BIN)/python -m tools.prepare austen
	$(BIN)/python -m pretrain configs/tiny.yaml
	$(BIN)/python -m tools.report runs/tiny
	$(BIN)/python -m tools.generate runs/tiny --prompt "It is a truth"

test: setup cluster
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# A real SLURM for tests/cluster, where it can be installed; elsewhere they are skipped.
cluster:
	@tests/cluster/install.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info
