# Everything runs in .venv, made on first use. CPU build here and in CI: TORCH="torch==2.13.0"; a GPU user sets TORCH=torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

# the ends of the range, and a version between two behaviours (who encodes the images, generate() or the forward)
OLDER := 5.17.0 4.57.6

.PHONY: demo test test-long test-older lint benchmark matrix clean

# llava-torch without its pins, which are of 2023: tests/test_original_llava.py says with what it runs
.venv/ready: setup.cfg pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[examples,test]"
	$(BIN)/pip install --quiet --no-deps llava-torch==1.2.2.post1
	touch $@

demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/ready
	$(BIN)/python -m pytest -n 2

test-long: .venv/ready
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -m "" --timeout 1800

.venv/transformers-%: .venv/ready
	$(BIN)/pip install --quiet --target $@ "transformers==$*"

test-older: $(OLDER:%=.venv/transformers-%)
	for version in $(OLDER); do \
	  PYTHONPATH=.venv/transformers-$$version $(BIN)/python -m pytest -n 2 $(FLAGS) -W ignore::DeprecationWarning \
	    tests/test_forward.py tests/test_generate.py tests/test_lifecycle.py tests/test_wrappers.py || exit 1; \
	done

matrix: .venv/ready
	$(BIN)/python -m pytest -n 2 --matrix
	$(MAKE) test-older FLAGS=--matrix
	$(BIN)/python examples/tables.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: .venv/ready
	$(BIN)/python examples/benchmark.py

clean:
	rm -rf .venv build dist *.egg-info
