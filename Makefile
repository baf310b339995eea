.DEFAULT_GOAL := help
.PHONY: help demo test lint notebooks browser figures lab

PYTHON ?= python3
OUT ?= runs/demo
BIN := .venv/bin
STAMP := .venv/.installed
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## (.*)/\1\t\2/' | expand -t 12

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

demo: $(STAMP) ## Run the demo (OUT=folder, default runs/demo)
	$(BIN)/granq demo --out "$(OUT)"

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest -q

lint: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy granq

notebooks: $(STAMP) ## Execute every notebook
ifeq ($(NOTEBOOKS),)
	@echo "No notebook exists under notebooks/: nothing was executed."
else
	$(BIN)/python -m pytest --nbmake notebooks
endif

browser: $(STAMP) ## Run notebooks in JupyterLab in a real browser (Debian: installs chromium)
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }
	$(BIN)/python -m pytest -q -m browser tests/test_browser.py

figures: $(STAMP) ## Measure digits into figures/quick; draw figures/ again from its CSV (TEACHER=, DATA=folder:... measures it anew)
	$(BIN)/granq figures --preset quick --out figures/quick
ifneq ($(TEACHER),)
	$(BIN)/granq figures --preset cifar10 --teacher "$(TEACHER)" $(if $(DATA),--data "$(DATA)") --out figures
else
	$(BIN)/granq figures --from-csv --out figures
endif

lab: $(STAMP) ## Open JupyterLab on 127.0.0.1, with a token, at the first notebook
	$(BIN)/jupyter lab --ip=127.0.0.1 notebooks/00_start_here.ipynb
