# Every target makes the environment first: `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tests of a file share what they prepare, and stay in one process.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --cov --cov-report=term:skip-covered
READY := $(VENV)/.ready

.PHONY: demo test test-all test-torch mutants claims torture check docs format bench install

install: $(READY)

$(READY): pyproject.toml setup.py cluster/engines/exact.cpp cluster/engines/exact_kernels.hpp cluster/engines/exact_tiles.hpp
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]' $(PINNED)
	touch $@

demo: $(READY)
	$(BIN)/ktransfer demo --out runs/demo

test: $(READY)
	$(PYTEST) -m "not slow" --cov-fail-under=90

test-all: $(READY)
	$(PYTEST)

# The suite on another torch, in an environment of its own: make test-torch TORCH=2.11
test-torch:
	$(if $(TORCH),,$(error make test-torch needs a version, such as TORCH=2.11))
	$(MAKE) test VENV=.venv-torch-$(TORCH) PINNED='"torch==$(TORCH).*"'

# Breaks the files that matter most, one place after the other; docs/testing.md holds what survives, and why.
MINUTES ?= 30
mutants: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[mutants]'
	nice $(BIN)/python tests/support/mutants.py --minutes $(MINUTES)

# The papers' claims, each decided by a study; docs/claims.md. Goes on where it was stopped; ONLY=04,06 for some.
claims: $(READY)
	$(BIN)/python benchmarks/claims.py $(if $(ONLY),--only $(ONLY))

# Kills, hostile files and faults of the machine; writes the table of docs/reliability.md. HOURS=8 for a night.
HOURS ?= 0.17
torture: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[torture]'
	$(BIN)/python tests/torture/torture.py --hours $(HOURS) --table docs/reliability.md

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive ktransfer pretext cluster retrain eval
	rm -rf build && $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m pip install --quiet --no-deps --target build/site build/wheel/*.whl
	cd build/site && MYPYPATH=. ../../$(BIN)/mypy --python-executable ../../$(BIN)/python --config-file ../../pyproject.toml -p ktransfer

# The documentation as a site, build/docs/index.html; whatever Sphinx warns of is an error.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs build/docs

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Some hours on two cores; each script says in its docstring how to run it alone.
bench: $(READY)
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done
