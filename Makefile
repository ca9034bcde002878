# Everything runs in .venv, made on first use. CPU build here and in CI: TORCH="torch==2.13.0"; a GPU user sets TORCH=torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

# the ends of the range, and a version between two behaviours (who encodes the images, generate() or the forward)
OLDER := 5.17.0 4.57.6

.PHONY: demo test test-long test-older lint benchmark matrix pruner evaluate clean

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
	    tests/test_forward.py tests/test_generate.py tests/test_lifecycle.py tests/test_wrappers.py tests/test_gate.py tests/test_original_llava.py || exit 1; \
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

# the shipped pruner: scenes of the testbed as conversations (fetches its sources), then the Trainer
PRUNER_OPTIONS := --share 1 --batch 16 --steps 140 --learning-rate 2e-3 --weight 10 --difference
pruner: .venv/ready
	$(BIN)/python examples/testbed/train.py --stages sources scenes
	$(BIN)/python examples/testbed/conversations.py
	for seed in 0 1 2; do \
	  $(BIN)/python examples/train_pruner.py examples/testbed/model runs/testbed/conversations/conversations.json \
	    --output runs/pruners/ntp-seed$$seed --seed $$seed $(PRUNER_OPTIONS) || exit 1; \
	done
	$(BIN)/python examples/testbed/ship_pruner.py runs/pruners/ntp-seed0

# every figure of the evaluation again, from three seeds; the sweeps with the first
evaluate: .venv/ready
	$(BIN)/python examples/evaluate.py --workers 2 --pruners seed0=runs/pruners/ntp-seed0 \
	  seed1=runs/pruners/ntp-seed1 seed2=runs/pruners/ntp-seed2
	$(BIN)/python examples/evaluate.py --workers 2 --groups ladder layer ratio diversity text --splits seen_styles \
	  --pruners seed0=runs/pruners/ntp-seed0

clean:
	rm -rf .venv build dist *.egg-info
