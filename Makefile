# Two commands to know: `make serve` and `make test`. Both set up .venv when needed and are quick the second time.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PINS   := setup.cfg constraints.txt pyproject.toml
ARGS   ?=

.PHONY: help serve test test-slow check install clean

help:
	@echo "make serve      set up, then serve the bundled model on http://127.0.0.1:8000 (MODEL=... for another, ARGS=... for flags)"
	@echo "make test       set up, then run the quick suite (ARGS=... goes to pytest)"
	@echo "make test-slow  the tests behind the slow marker"
	@echo "make check      linters, types, layer rules"

serve: $(VENV)/.run
	@echo "==> serving on http://127.0.0.1:8000 (Ctrl-C ends it)"
	@exec $(BIN)/llm-engine serve $(MODEL) --host 127.0.0.1 --port 8000 $(ARGS)

test: $(VENV)/.test
	@echo "==> running the quick suite"
	@$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/.test
	@echo "==> running the slow tests"
	@$(BIN)/python -m pytest -m slow --timeout 3600 -o faulthandler_timeout=1800 $(ARGS)

check: $(VENV)/.test
	@PATH="$(abspath $(BIN)):$$PATH" scripts/check

install: $(VENV)/.run

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"llm-engine needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}; say make PYTHON=python3.11 ...")'
	@echo "==> making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian: apt-get install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.run: $(PINS) | $(VENV)/.python
	@echo "==> installing llm-engine (torch is large: minutes the first time)"
	@$(PIP) torch
	@$(PIP) -e '.[plot]'
	@echo "==> compiling the CPU kernels"
	@$(BIN)/python -m llm_engine.native
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@echo "==> installing what the tests need"
	@$(PIP) -e '.[test,dev,plot]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
