# Everything here runs in .venv, which the first target that needs it makes.
#
#   make demo    install multicolm, let the embedded models answer questions together
#   make test    install the tools too, run ruff, mypy and the tests
#   make test-engines   install real engines too (llama.cpp, vLLM on CPU), test against them;
#                       with LLAMA_SERVER=build, llama.cpp's own server too
#   make test-real      fetch two pretrained models (350 MB, once), test on them; with
#                       MULTICOLM_REAL=all, the larger one in transformers too
#   make test-soak      64 clients of every manner against a server for ten minutes
#   make test-genlm     install genlm-bytes too, hold its next-byte probabilities against ours
#   make browser        install Debian's Chromium, for the tests of pages; needs root
#   make test-latest    the tests on the newest releases that pyproject.toml allows, in .venv-latest
#   make bench   install the tools too, measure speed; see benchmarks/README.md
#   make docs           build the site strictly into site/, with the versions of constraints.txt
#   make dist           build wheel and sdist, check both, run the first ten minutes from the wheel
#   make clean          remove every .venv, what was built, and caches

PYTHON ?= python3
VENV := .venv
ENGINES := .venv-engines
GENLM := .venv-genlm
LATEST := .venv-latest
DOCS := .venv-docs
INSTALLED := .venv-installed
BIN := $(VENV)/bin
CPU_WHEELS := https://download.pytorch.org/whl/cpu

# One thread per process: the embedded models are small, and on a shared machine a second thread
# makes them slower, not faster.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

PYTEST := -m pytest -n 2 --dist worksteal -q -rs

.PHONY: demo test lint types tests llama-cpp vllm test-engines test-genlm test-real test-soak test-latest browser bench docs dist clean

demo: $(VENV)/.installed
	@echo "== asking the embedded ensemble with every policy"
	@$(BIN)/python examples/demo/demo.py

test: lint types tests

lint: $(VENV)/.installed-dev
	@echo "== ruff: style and common mistakes"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	@echo "== mypy --strict on the package and its tools"
	@$(BIN)/mypy --strict multicolm tools

tests: $(VENV)/.installed-dev
	@echo "== tests"
	@$(BIN)/python $(PYTEST) --ignore tests/engines --ignore tests/real

llama-cpp: $(VENV)/.installed-dev
	@$(BIN)/python tests/engines/with_engines.py --llama-cpp

# In an environment of its own, so it can be installed while .venv is.
vllm:
	@$(PYTHON) tests/engines/with_engines.py --vllm $(ENGINES)

test-engines: llama-cpp vllm
	@LLAMA_SERVER=$(LLAMA_SERVER) $(BIN)/python tests/engines/with_engines.py $(ENGINES)

test-real: llama-cpp
	@$(BIN)/python tests/real/with_models.py

test-soak: $(VENV)/.installed-dev
	@PYTHONPATH=.:tests $(BIN)/python tests/serving/soak.py

test-genlm: $(GENLM)/.installed
	@echo "== tests against genlm-bytes"
	@$(GENLM)/bin/python -m pytest -p no:xdist -q -rs tests/tokenizer/test_genlm.py

# Without root, or where there is no apt, the tests of pages are skipped and say so.
browser:
	@if ! command -v chromium >/dev/null; then \
	  echo "== installing Debian's Chromium"; \
	  apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends chromium fonts-liberation >/dev/null || \
	  echo "== no Chromium: apt cannot install it here"; \
	fi

# Not in CI, which is to give the same answer tomorrow: this one is to see the next rename at once.
# PIP_CONSTRAINT holds back what a machine cannot have, such as a newer torch.
test-latest:
	@test -x $(LATEST)/bin/python || $(PYTHON) -m venv $(LATEST)
	$(call install,[dev],$(LATEST),--upgrade --upgrade-strategy eager)
	@$(LATEST)/bin/python -c "import torch, transformers as t; print('torch', torch.__version__, 'transformers', t.__version__)"
	@echo "== tests"
	@$(LATEST)/bin/python $(PYTEST)

bench: $(VENV)/.installed-dev
	@echo "== benchmarks: ratios within one run"
	@$(BIN)/python -m pytest benchmarks --benchmark-only -p no:xdist -q

$(VENV)/bin/python:
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# $(call install,EXTRA,VENV,OPTIONS). Without --no-compile most of the time goes into bytecode of
# modules that are never imported. Without an accelerator pip is offered the index of CPU builds,
# if it can be reached.
define install
	@echo "== installing multicolm$(1) into $(2); the first time takes a few minutes"
	@index=; \
	if ! command -v nvidia-smi >/dev/null 2>&1 && \
	   $(PYTHON) -c "import urllib.request as u; u.urlopen('$(CPU_WHEELS)/torch/', timeout=5)" 2>/dev/null; \
	then index="--extra-index-url $(CPU_WHEELS)"; fi; \
	$(2)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check $$index $(3) -e '.$(1)'
endef

# $(call venv_above,VENV): a new one that sees what is installed in .venv, but not this checkout.
define venv_above
	@$(PYTHON) -m venv --clear $(1)
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
	  "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth"
endef

comma := ,

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,,$(VENV),-c constraints.txt)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,[dev],$(VENV),-c constraints.txt)
	@touch $@ $(VENV)/.installed

# On top of .venv, as it brings bitsandbytes, with which peft is another peft.
$(GENLM)/.installed: $(VENV)/.installed-dev
	@echo "== installing genlm-bytes into $(GENLM)"
	$(call venv_above,$(GENLM))
	$(call install,[genlm],$(GENLM),-c constraints.txt)
	@touch $@

# Nothing may be installed into .venv while tests run in it, so these have a venv on top of it, too.
$(DOCS)/.installed: $(VENV)/.installed-dev
	$(call venv_above,$(DOCS))
	$(call install,[docs$(comma)release],$(DOCS),-c constraints.txt)
	@touch $@

docs: $(DOCS)/.installed
	@echo "== site: strictly, a warning is an error"
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --quiet --strict

# Without isolation: hatchling is the one of constraints.txt, and nothing is fetched.
dist: $(DOCS)/.installed
	@echo "== wheel and sdist"
	@rm -rf dist $(INSTALLED)
	@$(DOCS)/bin/python -m build --no-isolation . >/dev/null
	@$(DOCS)/bin/python -m twine check --strict dist/*
	@echo "== the wheel in an environment of its own, outside of the repository"
	$(call venv_above,$(INSTALLED))
	@$(INSTALLED)/bin/python -m pip install --quiet --no-deps --no-index --disable-pip-version-check dist/*.whl
	@$(BIN)/python tools/try_wheel.py $(INSTALLED)

clean:
	rm -rf $(VENV) $(ENGINES) $(GENLM) $(LATEST) $(DOCS) $(INSTALLED) dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
