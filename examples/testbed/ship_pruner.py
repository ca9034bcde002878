"""Put a trained pruner into the testbed's checkpoint, with its measured figures in the model card.

python examples/testbed/ship_pruner.py runs/pruners/ntp-seed0
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from retention import RESULTS, SPLITS, load

from lp_patch import LearnablePruner

TARGET = Path("examples/testbed/model/lp_patch_pruner")  # relative: the card says how to apply it


def main() -> None:
    """Copy, with the figures that the evaluation has of the label "seed0"."""
    pruner = LearnablePruner.from_pretrained(sys.argv[1])
    seen = [x for x in load(RESULTS) if x["split"] == SPLITS[0]]
    figures = {
        f"{x['scorer']} at {x['tokens']} tokens, {'both stages' if float(x['stage_ratio']) > 1 else 'stage 1 alone'}": (
            f"{100 * float(x['accuracy']):.1f} % of {x['n']} questions"
        )
        for x in seen
        if x["pruner"] == "seed0"
        and x["text_scorer"] in ("", "text")
        and x["stage_ratio"] in ("1.0", "3.0")
        and x["layer"] in ("", "2")
        and (x["diversity"] in ("", "0.1") or x["scorer"] == "covering")
    }
    full = next(x for x in seen if x["scorer"] == "full")
    pruner.training_info["figures"] = {"all 576 tokens": f"{100 * float(full['accuracy']):.1f} %", **figures}
    pruner.save_pretrained(TARGET)


if __name__ == "__main__":
    main()
