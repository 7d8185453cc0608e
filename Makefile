# nemo_engine: from a fresh clone, `make demo` and `make test` are all there is to do.
# A target sets up what it needs in .venv first; a second run finds it there.

VENV   ?= .venv
# What is installed where no suitable version is present yet. On Linux an index's plain torch is the CUDA build (gigabytes);
# for the small CPU build give pip its index as well: make demo TORCH="torch==2.13.0 --index-url ...".
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.6.0
PYTHON ?=
# For gpu-pack: an interpreter of the version that the machine with the GPU has, and what is installed into its environment.
GPU_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python) python3.12)
GPU_PACKAGES ?= torch==2.11.0 triton==3.6.0 numpy safetensors pytest pytest-xdist cmake ninja pybind11
PYTEST_ARGS ?=
# Each file in one of three processes: on two cores the third works while another waits for a server or a timer.
PYTEST_WAYS := -q --durations=10 -n 3 --dist loadfile --no-loadscope-reorder

# The suite starts hundreds of processes: each would compile every file again where the caller's environment forbids bytecode.
export PYTHONDONTWRITEBYTECODE :=

BIN := $(VENV)/bin
SETUP := TORCH="$(TORCH)" TRITON="$(TRITON)" PYTHON="$(PYTHON)" .ci/setup $(VENV)
SETUP_FILES := pyproject.toml setup.py csrc/build.py $(wildcard csrc/cpu/*) .ci/setup .ci/missing.py
CODE := nemo_engine $(wildcard kernels) tests examples benchmarks docs csrc/build.py setup.py .ci/missing.py
# Never with --quiet, which hides warnings from --strict too.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# A stamp for each set of packages: the package itself, with what the tests need, with the checking tools.
.PRECIOUS: $(VENV)/.installed-%
.PHONY: help demo test fuzz check docs test-op test-ray test-hosts cuda kernel-report bench-op gpu gpu-pack format clean
.DEFAULT_GOAL := help

help:  ## this list
	@echo "nemo_engine. Targets:"
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r t d; do printf '%-18s %s\n' "$$t" "$$d"; done
	@echo "Variables: PYTHON (interpreter), VENV (.venv), TORCH ($(TORCH)), TRITON ($(TRITON)), PYTEST_ARGS (-k ..., a path), MINUTES"

$(VENV)/.installed-%: $(SETUP_FILES)
	@$(SETUP) $(filter-out base,$*)
	@touch $@

demo: $(VENV)/.installed-base  ## install, then stream text for several prompts at once out of the bundled model
	@$(BIN)/nemo-engine demo

test: $(VENV)/.installed-test  ## install, then run the test suite
	@$(if $(PYTEST_ARGS),,echo "[test] does it work at all?"; $(BIN)/python -m pytest -q tests/test_tiny.py)
	@echo "[test] $(BIN)/python -m pytest $(PYTEST_WAYS) $(PYTEST_ARGS)"
	@$(BIN)/python -m pytest $(PYTEST_WAYS) $(or $(PYTEST_ARGS),--ignore=tests/test_tiny.py)

check: $(VENV)/.installed-dev  ## format, lint, types, layering, documentation
	@echo "[check] format";   $(BIN)/ruff format --check $(CODE)
	@echo "[check] lint";     $(BIN)/ruff check $(CODE)
	@echo "[check] types";    $(BIN)/mypy nemo_engine
	@echo "[check] layering and sizes"; $(BIN)/python -m pytest -q tests/test_layering.py tests/test_budget.py
	@echo "[check] documentation"; $(MKDOCS)

docs: $(VENV)/.installed-docs  ## build the documentation's site into build/docs; warnings are errors
	@$(MKDOCS)
	@echo "[docs] $(BIN)/python -m http.server -d build/docs 8080"

test-op: $(VENV)/.installed-test  ## one operation against its definition, Triton interpreted: make test-op OP=rms_norm
	@test -n "$(OP)" || { echo "name an operation: make test-op OP=rms_norm"; exit 2; }
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/ops/test_ops.py -k "$(OP)-"

fuzz: $(VENV)/.installed-test  ## random models, engines and requests against an independent reference: make fuzz MINUTES=60
	@$(BIN)/python tests/fuzz/run.py --minutes $(or $(MINUTES),5)

test-ray: $(VENV)/.installed-test  ## replicas and a folder of files on a local cluster of Ray, which is installed beside the tests' packages: half a gigabyte
	@$(BIN)/python -c "import ray.serve, ray.data" 2>/dev/null || \
	$(BIN)/python -m pip install -q "$$(sed -n 's/^ray = .*"\(ray\[serve\][^"]*\)".*/\1/p' pyproject.toml)" "ray[data]"
	@$(BIN)/python -m pytest -q -W ignore::DeprecationWarning tests/ray/replicas.py tests/ray/files.py

test-hosts: $(VENV)/.installed-test  ## after test-ray, as root: two hosts in network namespaces, whose link is cut and of which one is lost
	@$(BIN)/python -m pytest -q -s -W ignore::DeprecationWarning tests/ray/two_hosts.py

cuda: $(VENV)/.installed-test  ## build the CUDA kernels (nemo_engine._C) in this checkout; brings nvcc where there is none
	@$(BIN)/python csrc/build.py --which >/dev/null 2>&1 || $(BIN)/python .ci/missing.py nvcc | xargs $(BIN)/python -m pip install
	@$(BIN)/python csrc/build.py

kernel-report: $(VENV)/.installed-test  ## compile every kernel for sm_90a, print its machine code's facts, and store them for review
	@$(BIN)/python benchmarks/kernel_report.py --write
	@$(BIN)/python benchmarks/cuda_traffic.py --write
	@$(BIN)/python csrc/build.py --which >/dev/null && $(BIN)/python benchmarks/cuda_kernel_report.py --write

bench-op: $(VENV)/.installed-base  ## time operations on an NVIDIA GPU: make bench-op OP="linear paged_attention"
	@$(BIN)/nemo-engine bench ops --device cuda $(if $(OP),--op $(OP))

gpu:  ## on a machine with an NVIDIA GPU: tests, headline numbers, operations, a profile (SECONDS=510), with python3's packages or .venv's
	@python=$$(test -x $(BIN)/python && echo $(BIN)/python || echo python3); \
	$$python csrc/build.py || echo "[gpu] the CUDA kernels are not measured"; \
	$$python benchmarks/gpu.py --seconds $(or $(SECONDS),510) $(GPU_ARGS)

gpu-pack:  ## without a GPU: build/gpu-pack, with all that `make gpu` would compile on a machine of other versions (GPU_PYTHON, GPU_PACKAGES)
	@python=$(GPU_PYTHON); $$python -c "import torch, triton" 2>/dev/null || { \
	python=$(VENV)-gpu/bin/python; test -e $(VENV)-gpu/.installed || { \
	$(GPU_PYTHON) -m venv $(VENV)-gpu && $$python -m pip install -q $(GPU_PACKAGES) && touch $(VENV)-gpu/.installed; }; } && \
	$$python benchmarks/gpu_pack.py

format: $(VENV)/.installed-dev  ## rewrite the code in the project's format, and fix what lint can fix
	@$(BIN)/ruff format $(CODE)
	@$(BIN)/ruff check --fix $(CODE)

clean:  ## remove build outputs and caches; .venv stays
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
	@echo "[clean] removed build outputs and caches; $(VENV) is kept (rm -rf $(VENV) removes it)"
