# `make run` and `make test` work in a fresh clone: each sets up .venv first.
PYTHON ?= python3
# The processes that run the tests, each with a local cloud of its own: most tests wait for one.
JOBS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.PHONY: install run test test-all check badges bench bench-engines lint format notebooks pictures lab clean clean-cache help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(INSTALLED): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 15) else "Python 3.11 to 3.14 is needed; found " + sys.version.split()[0] + ". apache-beam supports no later one yet. Name another: make PYTHON=python3.12")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip --constraint constraints.txt
	$(PY) -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

install: $(INSTALLED) ## set up .venv

run: $(INSTALLED) ## run the notebooks in order on this machine, into out/
	$(PY) tools/run_notebooks.py --out out

test: $(INSTALLED) ## the tests
	$(PY) -m pytest -m "not slow and not gpu" -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-all: $(INSTALLED) ## the tests, those that take minutes too
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

bench: $(INSTALLED) ## measure side by side, into out/bench.json and out/engines: PEERS=--peers for others too
	$(PY) tools/bench.py --out out/bench.json
	$(PY) tools/bench_engines.py --out out/engines $(PEERS)

bench-engines: $(INSTALLED) ## measure the engines, into docs/engines and its page
	$(PY) tools/bench_engines.py $(PEERS)
	$(PY) tools/engine_tables.py

check: $(INSTALLED) ## check what a reader sees: notebooks, pages, links, badges, spelling, style
	$(PY) tools/check.py

badges: $(INSTALLED) ## write badges and the set-up cells' address: REPOSITORY=OWNER/NAME BRANCH=main
	$(PY) tools/badges.py $(if $(REPOSITORY),--repository "$(REPOSITORY)") $(if $(BRANCH),--branch "$(BRANCH)")

lint: $(INSTALLED) ## check modules and notebooks
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

format: $(INSTALLED) ## format modules and notebooks
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

notebooks: $(INSTALLED) clean ## run the notebooks on this machine, from nothing, and write their outputs into notebooks/
	$(PY) tools/run_notebooks.py --out out --commit
	$(PY) tools/saved_result.py
	$(PY) tools/pictures.py

pictures: $(INSTALLED) ## make the README's picture from the notebooks' outputs
	$(PY) tools/pictures.py

lab: $(INSTALLED) ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab notebooks

clean: ## remove what the notebooks left on the local cloud
	rm -rf .local_cloud

clean-cache: ## remove what was downloaded and made beside it: models, and copies for workers
	rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/streaming-llm"
