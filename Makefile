# Needs Python 3.11 or later with pip, and make. Every target makes its own environment in .venv/ first.
#
# PIP_ARGS   extra arguments for every pip call, to choose the build of torch, for example
#              make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#              make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cu130"
#            Left empty on Linux without an NVIDIA driver, the CPU build is tried first (PyPI's is gigabytes of CUDA there);
#            where that index does not answer, and everywhere else, pip chooses.
# DEMO_ARGS  arguments for `stepwell demo`; WORKERS: processes for the tests; PYTHON: the interpreter to build .venv/ with

PIP_ARGS ?=
DEMO_ARGS ?=
WORKERS ?= 2
CPU_INDEX := https://download.pytorch.org/whl/cpu

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt $(PIP_ARGS)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SOURCES := pyproject.toml constraints.txt

.PHONY: help demo test test-slow test-runtimes coverage check bench papers clean
.NOTPARALLEL:

help:
	@echo "make demo       train, round and export a small network, and write the report (minutes)"
	@echo "make test       the test suite, under ten minutes"
	@echo "make test-slow  the full cross product; its log goes to tests/results/slow.log"
	@echo "make test-runtimes  models in llama.cpp (built here), OpenVINO and ExecuTorch: installs them first; log in tests/results/"
	@echo "make coverage   branch coverage of what reads other people's files; fails below 90 percent"
	@echo "make check      lint, format, types, import layers"
	@echo "make bench      every file in benchmarks/, results to benchmarks/results/"
	@echo "make papers     every figure in papers/, results to papers/<paper>/results/"
	@echo "make clean      remove .venv/, caches and outputs"

demo: .venv/.demo
	$(BIN)/stepwell demo $(DEMO_ARGS)

test: .venv/.dev
	$(PYTEST) -m "not slow" -n $(WORKERS)

test-slow: SHELL := bash
test-slow: .SHELLFLAGS := -o pipefail -c
test-slow: .venv/.dev
	@mkdir -p tests/results
	$(PYTEST) -m slow -n $(WORKERS) --timeout 3600 --durations 20 2>&1 | tee tests/results/slow.log

test-runtimes: SHELL := bash
test-runtimes: .SHELLFLAGS := -o pipefail -c
test-runtimes: .venv/.runtimes
	$(PYTEST) -m slow -n 0 --timeout 3600 -rs --disable-warnings --durations 20 tests/export/test_runtime_*.py 2>&1 | tee tests/results/runtimes.log

# Which files count, and the least that is enough, is in pyproject.toml.
READING := tests/ship tests/commands/test_inspect.py tests/commands/test_verify.py tests/commands/test_quantize_activations.py \
    tests/export/test_onnx_file.py tests/export/test_nbits.py tests/export/test_qdq.py tests/export/test_gguf.py tests/export/test_codes.py \
    tests/test_storage.py tests/test_packing.py

coverage: .venv/.dev
	$(PYTEST) -m "not slow" -n 0 --cov --cov-report=term-missing $(READING)

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) tests/test_layers.py

bench: .venv/.bench
	@for script in $(or $(wildcard benchmarks/*.py),$(error no benchmarks/*.py here)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

papers: .venv/.dev
	@for script in $(or $(wildcard papers/*/*.py),$(error no papers/*/*.py here)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build dist out
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. A stamp per set of extras: made again when the requirements change.

.venv/.torch: $(SOURCES)
	@python=; for name in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	    if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$name; break; fi; done; \
	if [ -z "$$python" ]; then echo "stepwell needs Python 3.11 or later; not found as: $(or $(PYTHON),python3). Name one: make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	echo "Installing into .venv/ with $$($$python --version); the first time takes minutes."; \
	$$python -m venv .venv
	@if [ -z "$(PIP_ARGS)" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
	    $(PIP) install --quiet --constraint constraints.txt --no-deps --timeout 15 --retries 1 --index-url $(CPU_INDEX) torch 2>.venv/torch.log \
	    || echo "No CPU build of torch from $(CPU_INDEX): pip chooses one. PIP_ARGS decides otherwise."; fi
	@touch $@

.venv/.demo: .venv/.torch
	$(INSTALL) --editable '.[demo]'
	@touch $@

.venv/.dev: .venv/.torch
	$(INSTALL) --editable '.[dev]'
	@touch $@ .venv/.demo

.venv/.runtimes: .venv/.dev
	$(INSTALL) --editable '.[dev,runtimes]'
	@touch $@

.venv/.bench: .venv/.torch
	$(INSTALL) --editable '.[demo,fast,bench]'
	@touch $@ .venv/.demo
