# The two commands of the README are `make demo` and `make test`; each does all of its own set-up in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test faults soak fuzz serve lint bench clean

demo: $(INSTALLED)
	$(BIN)/karst-hub demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

faults: $(INSTALLED)
	$(BIN)/python -m pytest -m long

soak: $(INSTALLED)
	$(BIN)/python -m tests.soak

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz_files --files 100000
	$(BIN)/python -m tests.fuzz_api

serve: export HUB_BACKBONE ?= demo
serve: $(INSTALLED)
	$(BIN)/karst-hub serve

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/lua.py
	$(BIN)/python .ci/audit.py

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.mixed_batch
	$(BIN)/python -m benchmarks.over_http

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
