# Everything runs in a virtual environment that is made on first use: .venv with the python3 at hand, or
# .venv-3.12 with `make PYTHON=python3.12 ...`. Nothing is fetched again until pyproject.toml or the kernels change.

ifeq ($(origin PYTHON),undefined)
PYTHON := python3
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
BIN := $(VENV)/bin
# pip would compile every module of every package to bytecode; Python does it for those that are imported. (In its
# environment the option reads the wrong way round: 0 means not to.)
INSTALL := PIP_NO_COMPILE=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
PIP := $(INSTALL) $(BIN)/python -m pip install
# The old jaxlib has wheels for Python 3.10 to 3.13.
METAL_PYTHON ?= $(PYTHON)
METAL_VENV := .venv-metal
KERNELS := $(wildcard jaxq/kernels/cpu/CMakeLists.txt jaxq/kernels/cpu/*.cc jaxq/kernels/cpu/*.h)

.PHONY: help demo test emulate sanitize lint bench metal format clean

help:
	@echo 'make demo     train, quantize and compare small models; takes a minute or two'
	@echo 'make test     every test (ARGS="-k vmap -x" goes to pytest)'
	@echo 'make emulate  Arm and AMX kernels in emulators, where these are installed (ARGS=--quick: fewer cases)'
	@echo 'make sanitize CPU kernels under Address-, UB- and ThreadSanitizer, and fuzzed (ARGS=--quick: minutes less)'
	@echo 'make lint     style and types'
	@echo 'make bench    the speed of products, beside dense ones and MLX; takes minutes'
	@echo 'make metal    check what jax-metal would get, on the jaxlib that it was made for'
	@echo 'make format   rewrite the sources to the style'
	@echo 'make clean    remove the environments and what was built'
	@echo 'All take PYTHON=python3.12 or the like; the default is python3.'

demo: $(VENV)/.extra-demo
	$(BIN)/python examples/digits.py
	$(BIN)/python -m examples.llm.demo

test: $(VENV)/.extra-test
	$(BIN)/python -m pytest -n 2 $(ARGS)

# Exits with 77 mean that a tool is missing; the script has said so.
emulate: $(VENV)/.installed
	PYTHON=$(abspath $(BIN))/python jaxq/kernels/cpu/scripts/test_arm.sh $(ARGS) || [ $$? = 77 ]
	jaxq/kernels/cpu/scripts/test_amx.sh $(ARGS) || [ $$? = 77 ]

lint: $(VENV)/.extra-test $(VENV)/.extra-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.extra-demo
	$(BIN)/python benchmarks/quantized_matmul.py

metal: $(VENV)/.extra-test $(METAL_VENV)/.installed
	$(BIN)/python tools/metal.py write build/metal
	$(METAL_VENV)/bin/python tools/metal.py run build/metal

format: $(VENV)/.extra-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sanitize: $(VENV)/.installed
	PYTHON=$(abspath $(BIN))/python jaxq/kernels/cpu/scripts/sanitize.sh address $(ARGS) || [ $$? = 77 ]
	PYTHON=$(abspath $(BIN))/python jaxq/kernels/cpu/scripts/sanitize.sh thread $(ARGS) || [ $$? = 77 ]

clean:
	rm -rf .venv .venv-* build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache

# ---- environments. A stamp is written when its step has succeeded, so a broken download is tried again.

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit("jaxq needs Python 3.11 or newer, and $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml $(KERNELS)
	$(PIP) --editable .
	@touch $@

$(METAL_VENV)/.installed:
	@$(METAL_PYTHON) -c 'import sys; sys.exit("make metal needs Python 3.10 to 3.13 for jaxlib 0.4.34, and $(METAL_PYTHON) is %d.%d; name one: make metal METAL_PYTHON=python3.12" % sys.version_info[:2] if not (3, 10) <= sys.version_info < (3, 14) else 0)'
	$(METAL_PYTHON) -m venv --clear $(METAL_VENV)
	$(INSTALL) $(METAL_VENV)/bin/python -m pip install jax==0.4.34 jaxlib==0.4.34
	@touch $@

# The package is installed already, so this adds only what the extra asks for.
$(VENV)/.extra-%: $(VENV)/.installed
	$(PIP) 'jaxq[$*]'
	@touch $@

.PRECIOUS: $(VENV)/.extra-%
