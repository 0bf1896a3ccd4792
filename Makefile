# make demo: the main job on real photographs. make test: every check and test. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TYPED := build/typed/fmpq_fx

.PHONY: demo test check lint types unit format clean

demo: $(VENV)/.installed
	$(BIN)/fmpq-fx demo --out out

test: check unit

check: lint types

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# passes/ is imported as fmpq_fx.passes, which mypy can only follow where it lies inside the package.
types: $(VENV)/.installed
	rm -rf $(TYPED) && mkdir -p $(TYPED)
	ln -s $(CURDIR)/fmpq_fx/* $(CURDIR)/passes $(TYPED)/
	MYPYPATH=build/typed $(BIN)/mypy -p fmpq_fx
	MYPYPATH=build/typed $(BIN)/mypy tests examples benchmarks

# A process per core, up to four, with one thread of torch each: more threads would wait for each other.
unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed; pass PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info
