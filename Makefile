# README's two commands are `make demo` and `make test`; both set up everything they need.
PYTHON ?= python3
OUT ?= runs/gpu
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: install demo test lint unit interpreter wheel fuzz mutations gpu clean

install: .venv/installed build/extension

.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt setuptools pybind11 ninja
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[train,geo,dev]'
	touch $@

build/extension: $(SOURCES) .venv/installed
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

demo: install
	$(BIN)/timo demo

test: install lint unit interpreter wheel

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy timo

# One thread each: tests are many small problems, on which threads wait for each other.
unit: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal tests

# Triton's kernels on the CPU; the interpreter must be chosen before triton is imported.
interpreter: install
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests/ops -k triton

# Built without torch, installed in an environment of its own, used outside the tree.
wheel: install
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel -q --no-deps -w build/wheel .
	$(BIN)/python tests/wheel/run.py build/wheel/*.whl

# All random shapes of tests/ops/test_fuzz.py, of which `make test` runs a sample.
fuzz: install
	TIMO_FUZZ=all OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests/ops/test_fuzz.py
	TIMO_FUZZ=all TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests/ops/test_fuzz.py

# All faults of tests/mutations.py, of which `make test` plants a sample.
mutations: install
	TIMO_MUTATIONS=all OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests/test_mutations.py

gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT)

clean:
	rm -rf build dist *.egg-info timo/_C*.so
