.DEFAULT_GOAL := help
# every bound NAME>=VERSION of pyproject.toml as NAME==VERSION
BOUNDS = grep -oE '"[][A-Za-z0-9_-]+>=[0-9.]+"' pyproject.toml | tr -d '"' | sed -E 's/\[.*\]//; s/>=/==/'
# one room each; no notebooks, no timings. New versions of others deprecate what old ones do: these warnings are not ours
LOWEST := $(addprefix tests/test_,quantizer.py convert.py scaling.py integer.py qat.py match.py runs.py models.py \
	cli.py sweep.py)

.PHONY: help demo test lowest lint notebooks figures lab browser docs wheel gpu gpu-bundle

# threads that wait leave their core to others sooner; as granq's own commands do (docs/speed.md)
export GOMP_SPINCOUNT ?= 3000

PYTHON ?= python3
OUT ?= runs/demo
BUNDLE ?= gpu-bundle
BIN := .venv/bin
STAMP := .venv/.installed
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 12

$(STAMP): pyproject.toml
	@echo "torch, JupyterLab and the rest go into .venv: 7 GB, some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

demo: $(STAMP) ## Run the demo (OUT=folder, default runs/demo)
	$(BIN)/granq demo --out "$(OUT)"

# two processes with a thread each: the same bits as one, in about half the time
test: $(STAMP) ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lowest: ## Run half of the tests with exactly the lower bounds of pyproject.toml, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	$(BOUNDS) > .venv-lowest/bounds.txt
	.venv-lowest/bin/pip install -q -e '.[dev]' -c .venv-lowest/bounds.txt
	.venv-lowest/bin/python -m pytest -q -W ignore::DeprecationWarning -W ignore::FutureWarning \
		-W "ignore:Attempt to set:UserWarning" $(LOWEST)

lint: $(STAMP) ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy granq

# outputs are committed: benchmarks/lessons.py writes them
notebooks: $(STAMP) ## Execute every notebook, and compare with the outputs in it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m notebooks tests/test_notebooks.py

figures: $(STAMP) ## Measure digits into figures/quick; draw figures/ again from its CSV (TEACHER=, DATA=folder:... measures it anew)
	$(BIN)/granq figures --budget quick --out figures/quick
ifneq ($(TEACHER),)
	$(BIN)/granq figures --budget full --teacher "$(TEACHER)" $(if $(DATA),--data "$(DATA)") --out figures
else
	$(BIN)/granq figures --from-csv --out figures
endif

# without the user's configuration, which may have switched the token off; its terminals find granq. The folder is that
# of the checkout: lessons show pictures of figures/. In a container the user is root
lab: export PATH := $(CURDIR)/$(BIN):$(PATH)
lab: $(STAMP) ## Open JupyterLab on 127.0.0.1, with a token, at the first notebook
	JUPYTER_NO_CONFIG=1 $(BIN)/jupyter lab --ip=127.0.0.1 --notebook-dir=. $(AS_ROOT) notebooks/00_start_here.ipynb

browser: $(STAMP) ## Open notebooks and the documentation site in a real browser (Debian: installs chromium)
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }
	$(BIN)/python -m pytest -q -m browser tests/test_browser.py tests/test_site.py

docs: $(STAMP) ## Build the documentation site: docs/_build/html/index.html
	$(BIN)/python -m sphinx -q -W -E -d docs/_build/doctrees -c docs . docs/_build/html

wheel: $(STAMP) ## Build the wheel, install it into a fresh environment and use it from there
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m wheel tests/test_packaging.py

# with this checkout's Python if it has one, else the machine's: it may have torch and no network
gpu: ## Everything that needs a GPU, at most 8 minutes: tests, timings, a run; writes figures/cuda.md
	GRANQ_GPU_BUNDLE="$(BUNDLE)" $(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py --out figures

# 31 MB of images, 1 MB of weights, 20 MB of wheels; the folder then goes along to the machine with the GPU
gpu-bundle: $(STAMP) ## Fill BUNDLE (gpu-bundle) for a GPU machine without network: NETWORK= TEACHER= DATA=folder:... [MORE=options]
	$(BIN)/python benchmarks/gpu_bundle.py --network "$(NETWORK)" --teacher "$(TEACHER)" --data "$(DATA)" --out "$(BUNDLE)" $(MORE)
