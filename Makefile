# Each command installs everything that it needs into .venv. CONTRIBUTING.md says when to run which.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all faults soak fuzz serve lint bench bench-gpu clean

demo: $(INSTALLED)
	$(BIN)/karst-hub demo

# Four processes: three start with tests that mostly wait, for whole hubs, a browser or Prometheus; see tests/conftest.py.
PYTEST := $(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)
	$(PYTEST) -m "not slow and not long"

test-all: $(INSTALLED)
	$(PYTEST) -m "not long"

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
	$(BIN)/lint-imports --no-logo
	$(BIN)/vulture
	$(BIN)/python .ci/words.py
	$(BIN)/python .ci/audit.py

# make bench PART=over_http runs one part; it first prints how long it takes.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(PART)

# Ten minutes on one H100 or H200. Without a GPU: .venv/bin/python -m benchmarks.gpu --device cpu
bench-gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
