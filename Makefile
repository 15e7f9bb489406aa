# `make bench` and `make test` set everything up in .venv by themselves; PYTHON names the interpreter to start from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h') setup.py csrc/cuda_toolkit.py

.PHONY: all setup build lint test bench gpu clean

all: build

$(VENV)/.ready: requirements.txt csrc/cuda_toolkit.py
	@echo "== creating $(VENV) and installing pinned dependencies (a few GB the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt
	$(BIN)/python -m csrc.cuda_toolkit --install-if-missing
	touch $@

$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	@echo "== building the extension"
	$(BIN)/python setup.py build_ext --inplace
	touch $@

setup: $(VENV)/.ready

build: $(VENV)/.built

lint: setup
	$(BIN)/python tests/lint.py

test: build
	$(BIN)/python -m tests.ladder

bench: build
	$(BIN)/python -m benchmarks --quick --budget 150 --output report.json --html report.html

gpu:
	$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf build report.html report.json fastseg/_C*.so fastseg/_build.json $(VENV)/.built
