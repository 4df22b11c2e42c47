PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell command -v python$(v) 2>/dev/null)) python3)
BIN := .venv/bin
KVPRESS := $(CURDIR)/build/kvpress
# Extra arguments: make demo ARGS="--help"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-kvpress compare-kvpress lint cuda-check sanitize soak bench bench-kernels eval model clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

setup: ## create .venv with vLLM, this package and the development tools
	@$(PYTHON) scripts/setup_env.py

demo: setup ## answer from a long prompt with and without compression
	$(BIN)/kvcompress demo $(ARGS)

# Two engines with a thread each are done sooner than one after another with two; a
# module stays in one process, where its tests share an engine.
test: lint ## lint, types and the quick tests: what CI runs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-slow: setup ## the tests that take longer
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m slow $(ARGS)

test-kvpress: setup $(KVPRESS)/ready ## compare with kvpress, in an environment of its own
	KVCOMPRESS_KVPRESS_PYTHON=$(KVPRESS)/bin/python $(BIN)/pytest tests/kvpress $(ARGS)

compare-kvpress: setup $(KVPRESS)/ready ## accuracy, memory and time beside kvpress, on the same prompts
	KVCOMPRESS_KVPRESS_PYTHON=$(KVPRESS)/bin/python $(BIN)/python scripts/compare_kvpress.py $(ARGS)

$(KVPRESS)/ready:
	$(PYTHON) -m venv --clear $(KVPRESS)
	$(KVPRESS)/bin/python -m pip install --quiet torch==2.13.0 kvpress==0.5.5
	touch $@

cuda-check: setup ## compile the CUDA kernels for all GPUs with nvcc; registers and spills
	$(BIN)/pytest -rP tests/kernels/test_cuda_compile.py $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: setup ## the C++ kernels' tests under ASan and UBSan
	$(BIN)/python scripts/sanitize_kernels.py

soak: setup ## a server in little KV space under disorderly clients; ARGS="--requests 500"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.engine.soak $(ARGS)

bench: setup ## measure, such as ARGS="serve --help"; see make bench ARGS=--help
	$(BIN)/kvcompress bench $(ARGS)

bench-kernels: setup ## measure all kernels; ARGS="--csv FILE"
	$(BIN)/python scripts/bench_kernels.py $(ARGS)

eval: setup ## accuracy of all methods against stock vLLM, on the bundled model
	$(BIN)/kvcompress eval --out build/eval $(ARGS)

model: setup ## build the bundled needle model again
	$(BIN)/python scripts/make_needle_model.py $(ARGS)

clean: ## remove what builds and tools left; .venv stays
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
