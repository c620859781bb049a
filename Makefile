# setup: the environment; demo: the main job on real input; test: all tests; check: style, types,
# imports; evaluate: does it learn as well as unsplit training, over an hour; wheel: an installable
# file in dist. Needs Python 3.11 and its package registry.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test check evaluate wheel clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	# torch first and by its exact version: the CPU build, without several GB of CUDA packages
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# apart: PEFT imports it wherever it finds it, which costs each process a second
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps \
		--target .venv/beside bitsandbytes
	touch $@

demo: setup
	$(BIN)/cutlayer demo --output build/demo.json

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

evaluate: setup
	$(BIN)/cutlayer assets fetch evaluation
	$(BIN)/cutlayer eval suite --profile small --jobs 2 --threads 1 --out build/evaluation
	$(BIN)/cutlayer eval report build/evaluation

wheel: setup
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
