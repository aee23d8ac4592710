# What a newcomer types. Every target works from a bare clone: it makes .venv once and reuses it.
#
#   PYTHON=python3.12   the interpreter that makes the environment
#   VENV=path           another environment; one that exists already is completed, not replaced
#   NO_INSTALL=1        no environment: PYTHON itself has everything (a container without network, say)
#   ARGS="..."          more arguments for pytest or the demo
#   BUDGET=600          seconds after which `bench` starts nothing more

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BUDGET ?= 600
SHELL := /bin/bash

CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
BUILD_INPUTS := pyproject.toml setup.py tools/cuda_build.py CMakeLists.txt $(CXX_SOURCES)

ifdef NO_INSTALL
PY := $(PYTHON)
BIN :=
INSTALLED :=
else
PY := $(VENV)/bin/python
BIN := $(VENV)/bin/
INSTALLED := $(VENV)/.installed
endif

.DEFAULT_GOAL := help
.PHONY: help install demo examples test test-gpu bench sanitize lint format clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with the pinned versions, and build the extension where a CUDA toolkit is found

demo: $(INSTALLED) ## Show the fused blocks at work
	$(PY) -m resnet_fused demo $(ARGS)

examples: $(INSTALLED) ## Run the scripts of examples/, one or two minutes each; tables, and figures in examples/out
	for name in train_cifar degradation variants signal_propagation; do $(PY) examples/$$name.py $(ARGS) || exit 1; done

test: $(INSTALLED) ## All tests, on several cores; those that need a GPU skip themselves where there is none
	$(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

test-gpu: $(INSTALLED) ## All tests, those that need a GPU included; fails where there is none
	@$(NEEDS_GPU)
	$(PY) -m pytest $(ARGS)

bench: $(INSTALLED) ## Time kernels, blocks and networks beside their peers, what matters most first, for BUDGET seconds
	$(PY) -m pytest --benchmark --benchmark-budget $(BUDGET) $(ARGS)

sanitize: $(INSTALLED) ## The GPU tests under compute-sanitizer: memcheck, racecheck, initcheck, synccheck
	@command -v compute-sanitizer > /dev/null || { echo "sanitize: compute-sanitizer is not on PATH (it is part of the CUDA toolkit)" >&2; exit 1; }
	@$(NEEDS_GPU)
	for tool in memcheck racecheck initcheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
	    $(PY) -m pytest -m gpu $(ARGS) || exit 1; \
	done

lint: $(INSTALLED) ## Check style and types; writes nothing
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy
	$(BIN)clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(INSTALLED) ## Bring every file into the style that lint checks
	$(BIN)ruff check --fix .
	$(BIN)ruff format .
	$(BIN)clang-format -i $(CXX_SOURCES)

clean: ## Remove what builds and tests leave behind, but not .venv
	rm -rf examples/out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

NEEDS_GPU = $(PY) -c 'import torch; torch.cuda.is_available() or exit("$@: needs a CUDA GPU, and torch finds none")'

# Two stamps: editing a kernel rebuilds the extension alone, in seconds.
$(VENV)/.installed: $(VENV)/.dependencies $(BUILD_INPUTS)
	$(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	@$(PY) -c 'from resnet_fused import extension; print("extension:", extension.reason or "built for " + ", ".join(extension.build_info()["archs"]))'
	@touch $@

# The build's own tools first, so that the package builds with the pinned ones.
$(VENV)/.dependencies: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt setuptools pybind11 cmake ninja
	RESNET_FUSED_CUDA=skip $(PY) -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"
	@touch $@
