# `make train` and `make test` do everything from a fresh clone: environment, installation, run.
#
#   make train ARGS="--seed 1"         more arguments for python -m pssl.train
#   make pipeline                      from image labels to a segmentation network (python -m pssl.pipeline)
#   make test ARGS="-k contrast"       more arguments for pytest
#   make check-all                     everything that can be checked without a GPU; .ci/run is the part for a change
#   make train PYTHON=python3.12       another interpreter for the environment
#   make train TORCH="torch==2.13.0"   another torch than the one below; or install one into $(VENV) first

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# The range this release was tested with; installed first, so that it is unpacked once and built against.
TORCH ?= $(shell sed -n 's/^torch-when-absent = "\(.*\)"/\1/p' pyproject.toml)

BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard build_tools/*.py csrc/* csrc/*/*)
CXX_SOURCES = $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

.PHONY: train pipeline test env install lint format cuda-resources triton-resources clean check-all
.PHONY: test-cuda-emulated test-triton-interpreted
.PHONY: test-gpu test-gpu-build test-gpu-ops test-gpu-kernels test-gpu-sanitizer test-gpu-large
.DELETE_ON_ERROR:

train: $(VENV)/.installed
	$(BIN)/python -m pssl.train $(ARGS)

pipeline: $(VENV)/.installed
	$(BIN)/python -m pssl.pipeline $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

# The operators' tests over the CUDA kernels, run on the CPU under sanitizers, and over the Triton kernels in Triton's
# interpreter: tests/emulation.py says which. ARGS="suite -- -k contrast" for the one, "-k contrast" for the other.
test-cuda-emulated: $(VENV)/.installed-dev
	$(BIN)/python tests/cuda/run.py $(ARGS)

test-triton-interpreted: $(VENV)/.installed-dev
	$(BIN)/python tests/triton/run.py $(ARGS)

check-all:
	bash .ci/run --all

env: $(VENV)/.installed
	$(BIN)/python -m pssl_ext.env $(ARGS)

install: $(VENV)/.installed-dev

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES))
	$(BIN)/codespell $(shell git ls-files -- '*.py' '*.md' '*.toml' '*.h' '*.cpp' '*.cu' '*.cuh' Makefile .ci/run)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_SOURCES),$(BIN)/clang-format -i $(CXX_SOURCES))

# What the CUDA kernels take on every architecture, or with ARGS="8.0 9.0" on these; compiles them all, and needs nvcc
# but no GPU.
cuda-resources: $(VENV)/.installed-dev
	$(BIN)/python build_tools/cuda_resources.py $(ARGS)

# What the Triton kernels take on Ampere, Hopper and Blackwell, or with ARGS=90 on sm_90; compiles them all, and needs
# no GPU.
triton-resources: $(VENV)/.installed-dev
	$(BIN)/python build_tools/triton_resources.py $(ARGS)

# On a machine with a GPU, in the Python and with the torch that are there, offline: builds for that GPU, then runs the
# operators' tests on it and what only a GPU shows. The parts are for machines whose commands are cut off after some
# minutes: `make test-gpu-build test-gpu-ops`, then the others. Tests run side by side where pytest-xdist is installed,
# but for the large ones, which want the memory. The workspace setting is what cuBLAS needs for the same bits twice.
test-gpu: test-gpu-build test-gpu-ops test-gpu-kernels test-gpu-sanitizer test-gpu-large

GPU_PYTEST = PYTHONPATH=tests/gpu$${PYTHONPATH:+:$$PYTHONPATH} CUBLAS_WORKSPACE_CONFIG=:4096:8 \
	$(PYTHON) -m pytest -p on_gpu -q
GPU_WORKERS = $$($(PYTHON) tests/gpu/machine.py --workers)

test-gpu-build:
	$(PYTHON) tests/gpu/machine.py
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$($(PYTHON) tests/gpu/machine.py --capability)}" \
		$(PYTHON) -m pip install -e . --no-build-isolation --no-deps

test-gpu-ops:
	$(GPU_PYTEST) $(GPU_WORKERS) tests/ops $(ARGS)

test-gpu-kernels:
	$(GPU_PYTEST) $(GPU_WORKERS) tests/gpu/test_kernels.py tests/gpu/test_streams_and_graphs.py $(ARGS)

test-gpu-sanitizer:
	$(GPU_PYTEST) $(GPU_WORKERS) tests/gpu/test_sanitizer.py $(ARGS)

test-gpu-large:
	$(GPU_PYTEST) tests/gpu/test_large.py $(ARGS)

clean:
	rm -rf build dist *.egg-info $(VENV) pssl_ext/_build.json
	find pssl_ext -name '_C.*.so' -delete

# An environment that already holds a torch keeps it.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	touch $@

# Stamps: a second call installs again only if what is installed has changed. Python sources need no new
# installation, since it is an editable one; native code does, and compiles only what changed.
$(VENV)/.installed: $(SOURCES) | $(VENV)/.torch
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/.torch
	$(BIN)/python -m pip install -e ".[dev]"
	touch $(VENV)/.installed $@
