# `make demo` and `make test` do all, `make own` the first with pictures of yours. Everything is installed into .venv.
PYTHON ?= python3
WORKERS ?= 2
BENCH_SECONDS ?= 3
COVERAGE ?= --cov
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
ifeq ($(shell uname),Darwin)  # its make 3.81 looks programs up in the PATH of before, unless a shell does
SHELL := /bin/bash
endif
# The installation compiles nothing: what Python is not let keep, each start would compile anew, in twice the time.
export PYTHONDONTWRITEBYTECODE :=
# Programs are run as modules of this folder, which is not to be left out, nor another clone's taken.
export PYTHONSAFEPATH :=
# The tools' telemetry stays off (see also prefect.toml, .dvc/config, .streamlit/config.toml).
export DO_NOT_TRACK := 1
export BENTOML_DO_NOT_TRACK := True
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export STREAMLIT_BROWSER_GATHER_USAGE_STATS := false

.PHONY: help demo own test test-slow check audit bench pictures serve app pipeline operate install fits clean
.DEFAULT_GOAL := help
help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## all from a fresh clone: install, serve, show the canvas; train beside. SHARE=1: others draw along, by a link
	@$(PYTHON) -m app.demo

# make own IMAGES=DIR NAME=glyphs SIDE=28 COLOUR=binary LEVELS=2 MINUTES=4
own: export NAME := $(if $(filter command,$(origin NAME)),$(NAME))# some systems have a variable of this name
own: ## pictures of yours instead: IMAGES=DIR NAME=glyphs; without IMAGES, letters
	@$(PYTHON) -m app.demo own

# A module's tests stay in one process, with the servers that they share.
test: install ## the tests, on two cores (WORKERS=4: on four); ALL=1: the slow ones, too, as in CI
	python -m pytest $(if $(ALL),,-m 'not slow') --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder $(COVERAGE)

# The sizes that the documents state; `make test` asks for less of each.
test-slow: export FAULT_TIMES ?= 10
test-slow: export PIXELCNN_KILLS ?= 20
test-slow: export PIXELCNN_TEST_CASES ?= 1000
test-slow: export PIXELCNN_TEST_CROWD ?= 1000
test-slow: export PIXELCNN_TEST_DAMAGES ?= 1000
test-slow: export PIXELCNN_TEST_DRAWINGS ?= 10000
test-slow: export PIXELCNN_TEST_FLIPS ?= 400
test-slow: export PIXELCNN_TEST_IMAGES ?= 1000
test-slow: export PIXELCNN_TEST_INSTALL ?= 1
test-slow: export PIXELCNN_TEST_KILLS ?= 20
test-slow: export PIXELCNN_TEST_MACHINES ?= 2
test-slow: export PIXELCNN_TEST_NETWORKS ?= 200
test-slow: export PIXELCNN_TEST_PROCESSORS ?= haswell nehalem
test-slow: export PIXELCNN_TEST_RESTARTS ?= 100
test-slow: export PIXELCNN_TEST_SOAK_S ?= 600
test-slow: export PIXELCNN_TEST_STROKES ?= 500
test-slow: export PIXELCNN_TEST_SWAPS ?= 20
test-slow: install ## what is repeated, as often as docs/reliability.md wants: hours of kills, requests and load
	python -m pytest -s -m repeated

check: install ## format, lint, types, architecture
	ruff format --check .
	ruff check .
	mypy
	python -m pytest -q tests/test_architecture.py

# Its tools live apart, so that the bill of materials names what the project needs and nothing else.
audit: install ## known faults of the dependencies, and a bill of materials: reports/audit/sbom.json
	@$(PYTHON) -m venv .venv/audit
	@.venv/audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9,<3' 'cyclonedx-bom>=7,<8'
	@mkdir -p reports/audit
	.venv/audit/bin/cyclonedx-py environment $(BIN)/python --output-file reports/audit/sbom.json
	@# Those two are not in constraints.txt; of a build such as 2.9.0+cpu an index knows 2.9.0.
	@$(BIN)/python -c 'from importlib.metadata import version; \
	  [print(name, version(name).partition("+")[0], sep="==") for name in ("torch", "torchvision")]' > .venv/audit/torch.txt
	.venv/audit/bin/pip-audit --requirement constraints.txt --requirement .venv/audit/torch.txt --no-deps --disable-pip

bench: install ## the samplers, timed, each figure for BENCH_SECONDS=3
	@for pair in $(notdir $(wildcard weights/*)); do \
	  python -m pixelcnn bench --checkpoint weights/$$pair --sides 14 28 56 112 --seconds $(BENCH_SECONDS) \
	    --out reports/bench/$$pair.json || exit 1; echo; done
	python -m benchmarks.plot

pictures: install ## the docs' pictures, from a demo that is running (chromium)
	python -m tools.pictures --url http://127.0.0.1:$${CANVAS_PORT:-8501}

serve: install ## the service alone, on 127.0.0.1:3000
	bentoml serve app.service:PixelCNNService

app: install ## the canvas alone, on 127.0.0.1:8501
	streamlit run app/canvas/main.py

# Promoting registers what is in models/ first. Both act on a registry: DVC's cache must not decide that they are done.
pipeline: install ## the quick-start pipeline alone (dvc repro, promote)
	dvc repro
	@python -m pipelines.steps promote mnist5k

operate: install ## the deployments: Prefect's server and a worker, on this machine
	python -m pipelines.operate

install: .venv/installed ## into .venv, as all of these do first

# Its programs name their folder and its Python: those of one that was copied would run the other's code.
fits:
	@[ ! -e .venv/installed ] || \
	  case "$$(cat .venv/installed)" in "" | "$(CURDIR)") $(BIN)/python -c "" 2>/dev/null;; *) false;; esac || \
	  { echo "error: .venv was made in another folder, or its Python is gone. Run make clean, then this again."; exit 1; }

.venv/installed: pyproject.toml constraints.txt | fits
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: Python 3.11 to 3.13 is needed, '$(PYTHON)' is `$(PYTHON) --version 2>&1`. Name another: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: '$(PYTHON)' has no venv module. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@# An old pip takes longer to resolve. A venv whose making was interrupted has none.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear --upgrade-deps .venv
	@echo "installing into .venv (some minutes; about 2 GB, with CUDA several more) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'  # which knows groups
	@# Not compiled now: Python compiles what it imports, which is a fraction of all, at its first import.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  -e '.[pipelines,service,app]' --group dev -c constraints.txt
	@echo "$(CURDIR)" > $@

clean: ## take .venv away
	rm -rf .venv build *.egg-info
