# Each command installs everything that it needs into .venv. CONTRIBUTING.md says when to run which.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all faults soak fuzz serve lint bench clean

demo: $(INSTALLED)
	$(BIN)/karst-hub demo

# Three processes: one starts with all tests that share whole hubs, and mostly waits; see tests/conftest.py.
PYTEST := $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

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

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
