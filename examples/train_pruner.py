"""Train a pruner for any supported checkpoint on conversations in LLaVA's format: `lp-patch train`, as a script.

    python examples/train_pruner.py llava-hf/llava-1.5-7b-hf llava_v1_5_mix665k.json --images data --output pruner

The output folder is what `lp_patch.apply(model, pruner=...)` takes. Interrupted, the same command goes on from the last
checkpoint; `torchrun --nproc-per-node N examples/train_pruner.py ...` uses N devices.
"""

import sys

from lp_patch.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
