# Two commands for a fresh machine: `make demo` and `make test`. Each makes .venv if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first, by its exact version: any other way of asking may bring gigabytes of CUDA along
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c cluster/constraints.txt
export WANDB_SILENT ?= true
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: demo test chaos docs lab clean
demo: $(VENV)/ready
	$(BIN)/mlray demo

test: $(VENV)/ready
	$(BIN)/python tests/checks.py
	$(BIN)/python -m pytest -q -n auto --nb-pkg nbs
	$(BIN)/python -m pytest -q -n auto --dist loadgroup

chaos: $(VENV)/ready
	$(BIN)/python -m pytest -q -m chaos tests

# the documentation site, in .site; read it with: python -m http.server -d .site
docs: $(VENV)/ready
	$(BIN)/python tests/site.py

# JupyterLab lives in an environment of its own: a package it brings would slow every Ray process that shares it
lab: $(VENV)/ready $(VENV)-lab/ready
	$(VENV)-lab/bin/jupyter lab nbs

$(VENV)/ready: pyproject.toml cluster/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 7))' || { echo "Python 3.11.7 or newer is needed, for some packages at the versions pinned; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another, such as: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12"; exit 2; }
	@echo "Making $(VENV): three to five minutes, mostly downloads, and once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "1/2  PyTorch …"
	@$(INSTALL) torch==2.13.0
	@echo "2/2  mlray, and what it needs …"
	@$(INSTALL) -e '.[dev,delta,sql,estimators,privacy,postgres,oidc]'
	@touch $@

$(VENV)-lab/ready: pyproject.toml cluster/constraints.txt
	$(PYTHON) -m venv $(VENV)-lab
	$(VENV)-lab/bin/pip install --quiet --disable-pip-version-check -c cluster/constraints.txt jupyterlab ipywidgets
	$(BIN)/python -m ipykernel install --prefix $(VENV)-lab --name python3 --display-name mlray
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lab .mlray build dist *.egg-info
