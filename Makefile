# Two commands do all: `make demo` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# The tools' telemetry stays off (see also prefect.toml, .dvc/config, .streamlit/config.toml).
export DO_NOT_TRACK := 1
export BENTOML_DO_NOT_TRACK := True
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export STREAMLIT_BROWSER_GATHER_USAGE_STATS := false

.PHONY: demo test check audit bench pictures serve app pipeline operate install clean
.DEFAULT_GOAL := help
help:
	@echo "make demo      everything from a fresh clone: install, train the quick start, serve it, open the canvas"
	@echo "make test      install, then every test"
	@echo "make check     format, lint, types, architecture"
	@echo "make audit     known faults of the dependencies, and a bill of materials: reports/audit/sbom.json"
	@echo "make pipeline  the quick-start pipeline alone (dvc repro)"
	@echo "make operate   the deployments: Prefect's server and a worker, on this machine"
	@echo "make serve     the service alone, on 127.0.0.1:3000"
	@echo "make app       the canvas alone, on 127.0.0.1:8501"
	@echo "make bench     the samplers, timed"
	@echo "make pictures  the docs' pictures, from a demo that is running (chromium)"

demo: install
	@python -m app.demo --check-ports
	dvc repro
	@python -m pipelines.steps release
	@python -m app.demo

test: install
	python -m pytest

check: install
	ruff format --check .
	ruff check .
	mypy
	python -m pytest -q tests/test_architecture.py

# Its tools live apart, so that the bill of materials names what the project needs and nothing else.
audit: install
	@$(PYTHON) -m venv .venv/audit
	@.venv/audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9,<3' 'cyclonedx-bom>=7,<8'
	@mkdir -p reports/audit
	.venv/audit/bin/cyclonedx-py environment $(BIN)/python --output-file reports/audit/sbom.json
	.venv/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

bench: install
	@for pair in $(notdir $(wildcard weights/*)); do \
	  python -m pixelcnn bench --checkpoint weights/$$pair --sides 14 28 56 112 --out reports/bench/$$pair.json \
	    || exit 1; echo; done
	python -m pipelines.steps plot_bench

pictures: install
	PYTHONPATH=. python tests/app/pictures.py --url http://127.0.0.1:$${CANVAS_PORT:-8501}

serve: install
	bentoml serve app.service:PixelCNNService

app: install
	streamlit run app/canvas.py

pipeline: install
	dvc repro

operate: install
	python -m pipelines.operate

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: Python 3.11 to 3.13 is needed, '$(PYTHON)' is `$(PYTHON) --version 2>&1`. Name another: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: '$(PYTHON)' has no venv module. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (about 2.5 GB; some minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[pipelines,service,app,dev]' -c constraints.txt
	@# Once more, alone: the project's `dvc` command must be written after DVC's own (see pyproject.toml).
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall -e .
	@touch $@

clean:
	rm -rf .venv build *.egg-info
