# Everything a newcomer needs: `make run` and `make test` install what they use into .venv first.
PYTHON ?= python3
VENV ?= .venv
# What is installed where no torch in range is found; set it to choose another build, such as one for your CUDA version.
TORCH ?= torch==2.13.0
OUT ?= runs/demo
LAB ?= runs/lab
GPU_OUT ?= runs/first-light
# What `make gpu-prepare` makes for a GPU machine without a network, where `make gpu` finds it. It compiles in an environment with
# that machine's Python and triton; any build of torch does, and that of PyPI brings gigabytes of CUDA: choose another with
# GPU_TORCH="torch==2.11.0 --index-url ...", or set GPU_ENVIRONMENT to an environment that you have.
GPU_PREPARED ?= runs/gpu-prepare
GPU_PYTHON ?= python3.12
GPU_TORCH ?= torch==2.11.0
GPU_ENVIRONMENT ?= $(VENV)/gpu
OLDEST_TRITON := $(VENV)/triton-3.6.0
# beside the environment, not in it, and without what it asks for: no release of torch is replaced
FLASH_ATTN_4 := $(VENV)/flash-attn-4
FLASH_ATTN_4_PACKAGES := flash-attn-4==4.0.0b36 nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1 \
	nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-cu13==4.8.1 apache-tvm-ffi==0.1.15.post2 \
	torch-c-dlpack-ext==0.1.5 quack-kernels==0.6.5 einops==0.8.2 cuda-bindings==13.5.0 cuda-pathfinder==1.9.0
NUMERIC_TESTS := tests/kernels tests/model $(addprefix tests/train/test_,train.py sharding.py) tests/evaluate/test_likelihood.py \
	$(addprefix tests/generate/test_,engine.py rng.py generation_peers.py)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
HARNESS_READY := $(VENV)/.ready-lm-eval

.DEFAULT_GOAL := help
.PHONY: help setup run lab test test-cpus check docs test-slow test-faults bench bench-plots aot gpu gpu-prepare clean

help:  ## Show what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## Create the virtual environment and install sbp-fast into it

# A torch in range that the interpreter already has (a CUDA build, say) is used as it is, never replaced.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "Python 3.11 to 3.13 is needed, this is %d.%d: set PYTHON=python3.12, say" % v)'
	@echo "installing into $(VENV) (a few minutes the first time)"
	@if $(PYTHON) -c 'import torch; v = torch.__version__.split("."); assert (int(v[0]), int(v[1])) >= (2, 11)' 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet "$(TORCH)"; fi
	@$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $(READY)

run: $(READY)  ## Run the whole demo experiment and write its report (OUT=runs/demo)
	@$(BIN)/sbp-fast run configs/demo.toml --out $(OUT) --side-by-side 2

lab: $(READY)  ## Run worlds whose truth is known, with three seeds, and write their page (LAB=runs/lab)
	@$(BIN)/sbp-fast lab --out $(LAB)

test: check  ## Check style and types, then run every test that is not slow
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu"

test-cpus: $(READY)  ## The numeric tests on each kind of processor that torch and oneDNN can emulate
	@OMP_NUM_THREADS=1 $(BIN)/python tests/support/each_cpu.py -q -n 2 --dist loadfile -m "not slow and not gpu" $(NUMERIC_TESTS)

check: $(READY)  ## Lint, format, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=kernels $(BIN)/lint-imports --verbose >$(VENV)/imports.log 2>&1 || { cat $(VENV)/imports.log; exit 1; }

docs: $(DOCS_READY)  ## Build the documentation site into site/; a broken link or reference is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Only `make docs` needs what builds the site.
$(DOCS_READY): $(READY)
	@$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $(DOCS_READY)

test-slow: $(HARNESS_READY)  ## The slow tests: random kills of the whole pipeline and a comparison with lm-evaluation-harness among them
	@$(BIN)/python -m pytest -q -m "slow and not gpu"

$(HARNESS_READY): $(READY)
	@$(BIN)/python -m pip install --quiet --editable ".[lm-eval]"
	@touch $(HARNESS_READY)

test-faults: $(READY)  ## Kills, signals, full disks, damages and crafted files in every stage: not a bit may differ, or one line says why
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow tests/faults tests/end_to_end/test_faults.py \
		tests/end_to_end/test_synthesis_faults.py tests/neighbors/test_hnsw_file.py tests/pipeline/test_output.py

bench: $(READY)  ## Measure side by side what this machine can measure (OP=name for one)
	@$(BIN)/python -m bench $(OP)

bench-plots: $(READY)  ## Draw pictures of the committed results into bench/plots
	@$(BIN)/python -m bench.plot

aot: $(READY) $(OLDEST_TRITON) $(FLASH_ATTN_4)  ## Compile every kernel ahead of time, with two releases of Triton, and compare with the committed table
	@$(BIN)/python -m bench.aot $(ARGS)
	@$(if $(ARGS),,$(BIN)/python -m bench.aot.integers)
	@$(if $(ARGS),,$(BIN)/python -m bench.aot.flash_attn_4)

$(OLDEST_TRITON): | $(READY)
	@rm -rf $@.partial && $(BIN)/python -m pip install --quiet --no-deps --target $@.partial triton==3.6.0 && mv $@.partial $@

$(FLASH_ATTN_4): | $(READY)
	@rm -rf $@.partial && $(BIN)/python -m pip install --quiet --no-deps --target $@.partial $(FLASH_ATTN_4_PACKAGES) && mv $@.partial $@

gpu:  ## On a GPU machine: all there is to check and measure, in two parts of 560 and 180 seconds (PART=1 for one of them)
	@$(PYTHON) -m bench.first_light $(if $(PART),--part $(PART)) --out $(GPU_OUT) --prepared $(wildcard $(GPU_PREPARED)*)

gpu-prepare: $(READY) $(GPU_ENVIRONMENT)/bin/python  ## Collect for a GPU machine without a network: wheels and compiled kernels (FA4=1: FlashAttention-4 too)
	@$(BIN)/python -m bench.gpu_prepare --python $(GPU_ENVIRONMENT)/bin/python --out $(GPU_PREPARED) \
		$(if $(CHECK),--check) $(if $(FA4),--flash-attn-4 $(FLASH_ATTN_4_PACKAGES))

$(GPU_ENVIRONMENT)/bin/python: | $(READY)
	@rm -rf $(GPU_ENVIRONMENT).partial && $(GPU_PYTHON) -m venv $(GPU_ENVIRONMENT).partial
	@$(GPU_ENVIRONMENT).partial/bin/python -m pip install --quiet $(GPU_TORCH)
	@$(GPU_ENVIRONMENT).partial/bin/python -m pip install --quiet $$($(BIN)/python -m bench.gpu_prepare.wheels)
	@mv $(GPU_ENVIRONMENT).partial $(GPU_ENVIRONMENT)

clean:  ## Remove the environment, caches and the demo run
	rm -rf $(VENV) runs site .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
