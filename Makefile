# make demo: creates .venv, quantizes a small real model, inspects it, serves it and asks it one thing.
# make test: creates .venv and runs the tests; make check leaves out the slow ones, make test-all runs
# the exhaustive ones too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := examples/tiny-python-llama
DEMO := $(VENV)/demo

.PHONY: demo test test-all check lint docs clean

demo: $(VENV)/ready
	rm -rf $(DEMO) && mkdir -p $(DEMO)
	$(BIN)/qtool quantize --model-path $(MODEL) --method modelopt_fp8 --calibration $(MODEL)/calibration.jsonl \
		--num-samples 64 --seq-len 512 --output $(DEMO)/tiny-python-llama-fp8
	$(BIN)/qtool inspect --model-path $(DEMO)/tiny-python-llama-fp8
	$(BIN)/python examples/serve.py $(DEMO)/tiny-python-llama-fp8

test: $(VENV)/ready
	$(BIN)/pytest -n 2 --dist loadgroup -m 'not exhaustive'

test-all: $(VENV)/ready
	$(BIN)/pytest -n 2 --dist loadgroup

check: $(VENV)/ready
	$(BIN)/pytest -n 2 --dist loadgroup -m 'not slow and not exhaustive'

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict qtool

# the blocks of the documents that the program writes: help, error codes, published layouts
docs: $(VENV)/ready
	$(BIN)/python tests/test_docs.py
	$(BIN)/python tests/support/published_table.py

# torch is installed first and alone, so that its tested build satisfies everything else
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
