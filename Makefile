# Everything runs in .venv, made on first use. CPU build here and in CI: TORCH="torch==2.13.0"; a GPU user sets TORCH=torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test lint benchmark clean

.venv/ready: setup.cfg pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[examples,test]"
	touch $@

demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: .venv/ready
	$(BIN)/python examples/benchmark.py

clean:
	rm -rf .venv build dist *.egg-info
