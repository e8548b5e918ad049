# `make demo` and `make test` set everything up by themselves in .venv; the second run is quick.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
ifeq ($(origin CXX),default)
CXX := c++
endif
VENV := .venv
BIN := $(VENV)/bin
BUILD := build/dev
LIBRARY := coopflow_ext/libcoopflow_ext.so
ifeq ($(origin RUN),undefined)
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)
endif
PYTEST_ARGS ?=
JOBS ?= 2
# What `make wheel` holds machine code for; PTX serves the GPUs that come later.
WHEEL_ARCHITECTURES ?= 80-real;90-real;100-real;120-real;90-virtual
WHEEL_PLATFORM := manylinux_2_28_x86_64

# `make demo` on a machine without a GPU, where nothing was built yet, leaves out what it would not
# run; a later `make test` adds that to what is compiled. Options that are given win.
BUILT := $(shell cat build/.options 2>/dev/null)
LEAN := CUDA=0 ARCHITECTURES= HOST=0 ISAS=native
GIVEN := $(COOPFLOW_CUDA)$(COOPFLOW_CUDA_ARCHITECTURES)$(COOPFLOW_BUILD_HOST)$(COOPFLOW_CPU_ISAS)
GPU := $(wildcard /dev/nvidiactl /dev/dxg)
ifeq ($(MAKECMDGOALS):$(GIVEN):$(GPU):$(filter-out $(LEAN),$(BUILT)),demo:::)
export COOPFLOW_CUDA := 0
export COOPFLOW_BUILD_HOST := 0
export COOPFLOW_CPU_ISAS := native
FOR := , for the CPU of this machine alone: there is no GPU
endif

NATIVE_SOURCES := CMakeLists.txt coopflow_ext/_version.py \
  csrc/manylinux.cmake \
  $(shell find csrc -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \))
CXX_FILES = $(shell find csrc tests -type f \
  \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \))

.PHONY: help demo test check sanitize wheel sdist build lint docs clean FORCE

help:
	@echo "make demo   train on real images with the compiled kernels; says what to look at"
	@echo "make test   lint and the test suite"
	@echo "make check  the long tier: every test, and the wheel beside several torch versions"
	@echo "make sanitize  the CPU library under sanitizers and valgrind (part of make check)"
	@echo "make build  compile the native library into coopflow_ext/ (only what changed)"
	@echo "make lint   ruff, mypy, clang-format"
	@echo "make docs   the documentation as a site, build/site/index.html; warnings are errors"
	@echo "make wheel  dist/*.whl for every Python >= 3.10 and torch >= 2.10;  make sdist: dist/*.tar.gz"
	@echo "make clean  remove build/, dist/ and .venv"
	@echo "Variables: PYTHON=python3 TORCH=torch==2.13.0 COOPFLOW_CUDA=auto|0|1 JOBS=2 PYTEST_ARGS=..."

# --- set-up -------------------------------------------------------------------------------------------
PIP_FAILED = { echo "pip could not install this; see above. Without a network, give it a folder of \
  wheels: PIP_NO_INDEX=1 PIP_FIND_LINKS=/path/to/wheels make" >&2; exit 1; }
# The first stamp also says, in one line each, what the machine lacks.
$(VENV)/.torch: export PIP_DISABLE_PIP_VERSION_CHECK = 1
$(VENV)/.torch:
	@echo "setting up $(VENV) with $(TORCH), once"
	@[ "$$(uname -s)" = Linux ] || { echo "coopflow_ext builds on Linux only" >&2; exit 1; }
	@command -v "$(PYTHON)" >/dev/null || { echo "missing: $(PYTHON). Install Python >= 3.10 \
	(Debian: apt install python3) or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is \
	$$("$(PYTHON)" -V); Python >= 3.10 is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "missing: Python's venv module. \
	Install it (Debian: apt install python3-venv)" >&2; exit 1; }
	@command -v "$(firstword $(CXX))" >/dev/null || { echo "missing: a C++17 compiler ($(CXX)). \
	Install one (Debian: apt install g++) or set CXX" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy || $(PIP_FAILED)
	touch $@

$(VENV)/.build-tools: $(VENV)/.torch
	$(BIN)/python -m pip install --quiet 'cmake>=3.25' ninja 'pybind11>=2.13' \
	  'scikit-build-core>=0.12' 'setuptools>=77' || $(PIP_FAILED)
	touch $@

# The package itself, editable; the library in it comes from the rule below.
$(VENV)/.package: $(VENV)/.build-tools pyproject.toml
	COOPFLOW_SKIP_NATIVE=1 $(BIN)/python -m pip install --quiet --no-build-isolation -e '.[train]' \
	  || $(PIP_FAILED)
	touch $@

$(VENV)/.dev: $(VENV)/.package pyproject.toml
	COOPFLOW_SKIP_NATIVE=1 $(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev]' \
	  || $(PIP_FAILED)
	touch $@

# --- the native library -------------------------------------------------------------------------------
# Installed under another name and renamed, so that running processes keep the file they have mapped.
# On a terminal ninja keeps its status in one line.
$(LIBRARY): export NINJA_STATUS = [%f of %t files, %e s] $()
$(LIBRARY): $(NATIVE_SOURCES) build/.options | $(VENV)/.build-tools
	@echo "compiling the native library$(FOR)"
	$(BIN)/cmake -S . -B $(BUILD) -G Ninja --log-level=NOTICE \
	  -DPython_EXECUTABLE="$(abspath $(BIN))/python" \
	  -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN))/ninja"
	$(BIN)/cmake --build $(BUILD)
	$(BIN)/cmake --install $(BUILD) --prefix $(BUILD)/stage >/dev/null
	mv -f $(BUILD)/stage/coopflow_ext/*.so coopflow_ext/
	touch $@

# Changes only when the options do, and then the library is built again.
OPTIONS := CUDA=$(COOPFLOW_CUDA) ARCHITECTURES=$(COOPFLOW_CUDA_ARCHITECTURES) \
  HOST=$(COOPFLOW_BUILD_HOST) ISAS=$(COOPFLOW_CPU_ISAS)
build/.options: FORCE
	@mkdir -p build
	@echo '$(OPTIONS)' | cmp -s - $@ || echo '$(OPTIONS)' >$@
FORCE:

build: $(LIBRARY)

# --- what people run ----------------------------------------------------------------------------------
demo: $(VENV)/.package $(LIBRARY)
	@echo "training on scanned digits: about a minute on two cores"
	$(BIN)/coopflow train --data digits --preset digits-small --out "$(RUN)"
	@$(BIN)/coopflow report "$(RUN)" >/dev/null
	@echo
	@echo "Look at    $$(ls "$(RUN)"/samples/*.png | tail -n 1)  proposals of the flow beside the same after Langevin"
	@echo "and open   $(RUN)/report.html  the result, curves and settings as one page"
	@echo "Go on with $(BIN)/coopflow sample \"$(RUN)\" --out samples.png"
	@echo "or         $(BIN)/coopflow evaluate \"$(RUN)\""

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

docs: export NO_MKDOCS_2_WARNING = 1 # the theme's notice about another program
# Not --quiet: that drops the warnings which --strict counts.
docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict
	@echo "the site: build/site/index.html"

test: lint $(LIBRARY)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

sanitize: lint $(LIBRARY)
	tests/sanitize.sh $(BIN)/python

check: lint $(LIBRARY)
	tests/check.sh $(BIN)/python

# auditwheel refuses a library that needs newer system libraries than the platform has, and names it.
wheel: $(VENV)/.dev
	rm -rf build/lib.* build/bdist.* build/wheel # or setuptools packs what earlier builds left there
	COOPFLOW_BUILD_HOST=0 COOPFLOW_CUDA_ARCHITECTURES='$(WHEEL_ARCHITECTURES)' \
	  $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat $(WHEEL_PLATFORM) --only-plat \
	  --exclude 'libtorch*.so' --wheel-dir dist build/wheel/*.whl
	@ls -1sh dist/*.whl

sdist: $(VENV)/.dev
	$(BIN)/python -m build --sdist --no-isolation --outdir dist .

clean:
	rm -rf build dist $(VENV) *.egg-info coopflow_ext/*.so
