"""Put a trained pruner beside the weights that it belongs to, with its measured figures in the model card.

python examples/testbed/ship_pruner.py runs/pruners/ntp-seed0
python examples/testbed/ship_pruner.py runs/pruners/smollm-seed0 smollm

Weights of another kind go into a folder of its name: `examples/testbed/oc-vtp`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from retention import SPLITS, STUDIES, digest

from lp_patch import LearnablePruner
from lp_patch.pruner import Pruner


def main() -> None:
    """Copy, with the figures that the evaluation has of these weights."""
    folder = sys.argv[2] if len(sys.argv) > 2 else "model"
    results = STUDIES[folder].results()
    pruner = Pruner.from_pretrained(sys.argv[1])
    weights = digest(Path(sys.argv[1]) / "model.safetensors")
    figures = {}
    for (split, cell), rows in results.rows.items():
        for row in rows:
            if split != SPLITS[0] or row["pruner_sha256"] != weights or cell.tokens > 64:
                continue
            for mode, title in results.modes:
                own_rule = cell.scorer == "covering" or cell.scorer == pruner.kind != LearnablePruner.kind
                usual = cell.diversity in (None, 0.1) or own_rule
                if usual and all(getattr(cell, name) == value for name, value in mode.items()):
                    figures[f"{cell.scorer} at {float(row['average']):.1f} tokens, {title}"] = (
                        f"{100 * float(row['accuracy']):.1f} % of {row['n']} questions"
                    )
    if not figures:
        sys.exit(f"no row of the evaluation has the weights {weights}: run it first")
    (full,) = [x for (split, cell), x in results.rows.items() if split == SPLITS[0] and cell.scorer == "full"]
    figures = {"all 576 tokens": f"{100 * float(full[0]['accuracy']):.1f} %", **figures}
    pruner.training_info["figures"] = figures
    own = Path(folder) / "lp_patch_pruner" if pruner.kind == LearnablePruner.kind else Path(pruner.kind)
    pruner.save_pretrained(Path("examples/testbed") / own)  # relative: the card names it


if __name__ == "__main__":
    main()
