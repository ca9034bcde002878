"""Does `lp_patch.calibrate` find good settings for long answers? On a testbed's model that lists what is in a picture.

    python examples/testbed/smollm.py --start examples/testbed/smollm --captions --questions 1 --minutes 45 --batch 6 \\
        --tokens 96 288 --scenes 1000 --watch 0 --output runs/smollm/captions --model runs/smollm/smollm-captions
    python examples/testbed/long_answers.py --output examples/results/long_answers.csv

Calibrated on unlabelled requests to describe a scene; then asked about other scenes, none with photographs that
anything was trained on. An answer names each thing and its corner, in about 20 tokens; its score is the F1 of such
items. The CSV is written anew after each strategy and budget; what calibration found is in ``.json`` beside it and is
not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "testbed")]

from calibration import BATCH, BUDGETS, about
from evaluate import TOKENS, RememberedTower
from questions import caption
from scenes import RUNS, Style, build
from transformers import AutoProcessor, LlavaForConditionalGeneration

import lp_patch
from lp_patch.calibrate import ask
from lp_patch.evaluate import Outcome

UNLABELLED = 96
LENGTH = 56  # tokens of an answer at most
SCORERS = ("diversity", "learned")
ROWS = ("default", "stage 1 alone", "calibrated")


def f1(answer: str, wanted: str) -> float:
    """How well the items of an answer are those wanted, each as often as it is there: 0 to 1."""
    said, right = (Counter(x.strip() for x in text.split(",")) for text in (answer, wanted))
    return 2 * (said & right).total() / (said.total() + right.total())


class Setup:
    """The model with all pictures encoded, and what is asked about them."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        scenes = build(f"captions_{limit}", UNLABELLED + limit, 101, Style(held_out=True))
        self.wanted = [caption(found) for found in scenes.objects]
        encoded = [
            self.processor.image_processor(images=[Image.fromarray(x)], return_tensors="pt")["pixel_values"]
            for x in scenes.pictures
        ]
        with torch.inference_mode():
            RememberedTower(self.model, [x.bfloat16() for x in encoded])

    def prompts(self, start: int, stop: int) -> Iterator[dict[str, torch.Tensor]]:
        """Requests to describe these scenes, in batches; a picture's number is its pixels."""
        for first in range(start, stop, BATCH):
            numbers = list(range(first, min(first + BATCH, stop)))
            texts = [f"USER: {'<image>' * TOKENS}\n{self.wanted[x].text} ASSISTANT:" for x in numbers]
            yield {**self.processor.tokenizer(texts, return_tensors="pt"), "pixel_values": torch.tensor(numbers)}


def run(setup: Setup, pruner: Path, output: Path) -> None:
    """Calibrate, ask, write: one strategy and budget after the other."""
    path = output.with_suffix(".json")
    found = json.loads(path.read_text()) if path.exists() else {}
    known = ask(setup.model, setup.prompts(0, UNLABELLED), LENGTH) if len(found) < len(SCORERS) * len(BUDGETS) else []
    outcomes: list[Outcome] = []
    for scorer in SCORERS:
        start = {"scorer": scorer, **({} if scorer == "diversity" else {"pruner": pruner})}
        for tokens in BUDGETS:
            name = f"{scorer} {tokens}"
            if name not in found:
                result = lp_patch.calibrate(setup.model, known, tokens=tokens, **start)
                print(result, flush=True)
                found[name] = result.to_dict()
                path.write_text(json.dumps(found) + "\n")
            chosen = {x: found[name]["config"][x] for x in ("layer", "stage_ratio")}
            ways = ({"stage_ratio": 3.0}, {"stage_ratio": 1}, chosen)
            settings = {
                f"{name}: {row}": {**start, "tokens": tokens, "rounding": "down", **way}
                for row, way in zip(ROWS, ways, strict=True)
            }
            result = lp_patch.evaluate(
                setup.model,
                setup.prompts(UNLABELLED, len(setup.wanted)),
                settings,
                labels=[x.answer for x in setup.wanted[UNLABELLED:]],
                decode=lambda ids: setup.processor.tokenizer.decode(ids, skip_special_tokens=True),
                score=f1,
                max_new_tokens=LENGTH,
            )
            outcomes += result.outcomes[len(outcomes) > 0 :]  # the full model's once
            result = lp_patch.Evaluation(result.measure, tuple(outcomes), result.confidence)
            result.save(output, **about("bfloat16"))
            print(result, flush=True)
            for other in ROWS[:2]:
                gap = [100 * x for x in result.difference(f"{name}: calibrated", f"{name}: {other}")]
                print("{} calibrated - {}: {:+.1f} ({:+.1f} to {:+.1f})".format(name, other, *gap), flush=True)


def main() -> None:
    """Calibrate and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=RUNS / "smollm" / "smollm-captions")
    parser.add_argument("--pruner", type=Path, default=RUNS / "smollm" / "smollm-testbed" / "lp_patch_pruner")
    parser.add_argument("--limit", type=int, default=144, help="scenes to be asked about")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, pruner = (Path(os.path.relpath(x)) for x in (args.model, args.pruner))  # the CSV names them
    run(Setup(model, args.limit), pruner, args.output)


if __name__ == "__main__":
    main()
