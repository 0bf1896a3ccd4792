# make demo: the main job on real photographs. make test: every check and test. Both set up what they need.
VENV := .venv
BIN := $(VENV)/bin
TYPED := build/typed/fmpq_fx

# CompressAI, and the NumPy that it needs, come compiled for these versions of Python. PYTHON=... names one.
SUITS := import sys, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYENV := $${PYENV_ROOT:-$$HOME/.pyenv}/versions
CANDIDATES := python3 python3.12 python3.11 python3.10 "$(PYENV)"/3.1[0-2]*/bin/python \
	"$$(uv python find '>=3.10,<3.13' 2>/dev/null)"
FIND_PYTHON = for python in $(or $(PYTHON),$(CANDIDATES)); do \
	if "$$python" -c '$(SUITS)' 2>/dev/null; then echo "$$python"; exit; fi; done; \
	echo "Python 3.10, 3.11 or 3.12 with its venv module is needed, and was not found: install one, as by 'apt install\
	python3.12-venv', 'pyenv install 3.12' or 'uv python install 3.12', or pass PYTHON=path." >&2; exit 1

.PHONY: demo test check lint types unit format clean python

demo: $(VENV)/.installed
	$(BIN)/fmpq-fx demo --out out

# At the same time: the tests alone do not keep all cores busy to their end.
test: $(VENV)/.installed
	@$(MAKE) --no-print-directory --jobs 2 check unit

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

# A process per core, up to four, with one thread of torch each: more threads would wait for each other. Where a test
# asks for several threads all the same, one that waits leaves its core to another process. Each takes tests that follow
# one another, which share what they prepare, and in the end some of another's. A test that ends its process would do so
# in a new one, too.
unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --max-worker-restart 0 --dist worksteal

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: setup.cfg pyproject.toml
	@python=$$($(FIND_PYTHON)) && "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Prints the Python that the environment is made with.
python:
	@$(FIND_PYTHON)

clean:
	rm -rf $(VENV) build out *.egg-info
