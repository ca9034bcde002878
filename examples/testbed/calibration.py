"""Does `lp_patch.calibrate` find good settings, and what is a second stage worth at equal tokens? On a testbed's model.

    python examples/testbed/calibration.py --output examples/results/calibration_testbed.csv
    python examples/testbed/calibration.py --model runs/smollm/smollm-testbed --dtype bfloat16 \\
        --output examples/results/calibration_smollm.csv

Calibrated on unlabelled questions about scenes rendered for it, whose pictures are in no question of the evaluation;
their photographs are, as the evaluation's, none that the model or its pruner was trained on (``--trained`` takes those
that it was, to see what that does). Then asked the evaluation's questions, as are the default rounded down, and stage 1
alone at the tokens that the default's rounding up really spends. How the default and stage 1 alone answer is read from
the CSV that ``examples/evaluate.py`` wrote (whose "full" is here "full, there"). The pictures come in an order of which
any beginning is spread over all, and the CSV grows by a few of them at a time: stopped and started again, it goes on.
Beside it, ``.json`` holds what every calibration found, which ``--ship`` puts into a pruner; what it holds is not made
again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pickle
import random
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "testbed")]

from evaluate import TOKENS, RememberedTower
from questions import for_training
from retention import ALONE, STUDIES, TESTBED, Cell, base, bits, load, questions, text_mode
from scenes import RUNS, SceneSet, Style, build
from transformers import AutoProcessor, LlavaForConditionalGeneration

import lp_patch
from lp_patch.calibrate import Reference, ask
from lp_patch.evaluate import Outcome
from lp_patch.recommend import merged

SCENES, EACH = 32, 3  # questions to calibrate with
BATCH = 12
BLOCK = 4  # batches between two states of the CSV
SCORERS = ("diversity", "covering", "learned")
BUDGETS = (32, 16)
MEASURED = ("scores", "averages")
ROWS = ("default, rounded down", "stage 1 alone, a token more", "calibrated")


class Setup:
    """The model with all pictures encoded: those to calibrate with first, then those of the evaluation."""

    def __init__(self, folder: Path, dtype: torch.dtype, limit: int | None, scenes: SceneSet) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        asked = [x for x in questions() if x["split"] == "seen_styles"]
        names = sorted({x["picture"] for x in asked})
        self.pictures = [name for start in range(5) for name in names[start::5]][:limit]
        self.asked = [x for name in self.pictures for x in asked if x["picture"] == name]
        self.scenes = scenes
        images = [Image.fromarray(x) for x in self.scenes.pictures]
        images += [Image.open(TESTBED / "evaluation" / "pictures" / name).convert("RGB") for name in self.pictures]
        encoded = [self.processor.image_processor(images=[x], return_tensors="pt")["pixel_values"] for x in images]
        with torch.inference_mode():
            RememberedTower(self.model, [x.to(dtype) for x in encoded])

    def prompts(self, rows: list[tuple[int, str]]) -> Iterator[dict[str, torch.Tensor]]:
        """Questions (number of a picture, text), in batches; a picture's number is its pixels."""
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            texts = [f"USER: {'<image>' * TOKENS}\n{text} ASSISTANT:" for _, text in some]
            inputs = dict(self.processor.tokenizer(texts, padding=True, return_tensors="pt"))
            yield {**inputs, "pixel_values": torch.tensor([number for number, _ in some])}

    def unlabelled(self) -> list[dict[str, torch.Tensor]]:
        """What to calibrate with: three questions of mixed kinds a scene."""
        draw = random.Random(0)
        rows = [(i, x.text) for i, found in enumerate(self.scenes.objects) for x in for_training(found, draw, EACH)]
        return list(self.prompts(rows))

    def evaluation(self) -> list[dict[str, torch.Tensor]]:
        """The evaluation's questions."""
        rows = [(SCENES + self.pictures.index(x["picture"]), x["question"]) for x in self.asked]
        return list(self.prompts(rows))


def calibrate(setup: Setup, folder: Path, path: Path) -> dict[str, dict]:
    """What calibration finds for every scorer at every budget."""
    found = json.loads(path.read_text()) if path.exists() else {}
    known: list[Reference] = []
    for scorer in SCORERS:
        for tokens in BUDGETS:
            if f"{scorer} {tokens}" in found:
                continue
            known = known or ask(setup.model, setup.unlabelled())
            pruner = None if scorer == "diversity" else folder / "lp_patch_pruner"
            result = lp_patch.calibrate(setup.model, known, tokens=tokens, scorer=scorer, pruner=pruner)
            print(result, flush=True)
            found[f"{scorer} {tokens}"] = {**result.to_dict(), "recommendation": result.recommendation()}
            path.write_text(json.dumps(found) + "\n")
    return found


def settings(folder: Path, found: dict[str, dict], names: list[str]) -> dict[str, dict]:
    """What is asked the evaluation's questions, by name."""
    asked = {}
    for scorer in SCORERS:
        pruner = {} if scorer == "diversity" else {"pruner": folder / "lp_patch_pruner"}
        for tokens in BUDGETS:
            if f"{scorer} {tokens}" not in found:
                continue
            start = {"scorer": scorer, **pruner}
            calibrated = {x: found[f"{scorer} {tokens}"]["config"][x] for x in ("layer", "stage_ratio")}
            rows = {
                "default, rounded down": {"tokens": tokens, "stage_ratio": 3.0, "rounding": "down"},
                "stage 1 alone, a token more": {"tokens": tokens + 1, "stage_ratio": 1.0},
                "calibrated": {"tokens": tokens, **calibrated, "rounding": "down"},
            }
            asked |= {f"{scorer} {tokens}: {name}": {**start, **rows[name]} for name in names}
    return asked


def known(setup: Setup, path: Path) -> list[Outcome]:
    """What `examples/evaluate.py` measured of the default and of stage 1 alone, on the same questions."""
    rows = {Cell.of(row): row for row in load(path) if row["split"] == "seen_styles"}
    modes = {"default": text_mode(setup.model.config.text_config.num_hidden_layers), "stage 1 alone": ALONE}
    cells = {"full, there": Cell("full")}
    for scorer in SCORERS:
        for tokens in BUDGETS:
            start = base(scorer, None if scorer == "diversity" else "seed0")
            # it draws nothing but farthest points: its share of them says nothing
            start = replace(start, diversity=None) if scorer == "diversity" else start
            cells |= {f"{scorer} {tokens}: {x}": replace(start, tokens=tokens, **mode) for x, mode in modes.items()}
    order = [x["id"] for x in questions() if x["split"] == "seen_styles"]
    index = [order.index(x["id"]) for x in setup.asked]
    return [
        Outcome(name, {"from": path.name}, bits(row)[index], np.full(len(index), float(row["average"])))
        for name, row in ((name, rows[cell]) for name, cell in cells.items())
    ]


def _given(options: dict) -> dict:
    """Options without those that are left open."""
    return {name: x for name, x in options.items() if x is not None}


def cut(outcome: Outcome, length: int) -> Outcome:
    """The first so many answers."""
    return replace(outcome, **{name: getattr(outcome, name)[:length] for name in MEASURED})


def evaluate(
    setup: Setup, asked: dict[str, dict], beside: list[Outcome], scratch: Path
) -> Iterator[lp_patch.Evaluation]:
    """The evaluation so far, after each block of questions; `scratch` holds the blocks that are done."""
    words, prompts = setup.processor.tokenizer, setup.evaluation()
    # settings that come to the same are asked once
    first: dict[str, str] = {}
    for name, options in asked.items():
        first[name] = next((x for x in first if _given(asked[x]) == _given(options)), name)
    scratch.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Outcome]] = {}
    for start in range(0, len(prompts), BLOCK):
        path, some = scratch / f"{start:04d}.pt", prompts[start : start + BLOCK]
        labels = [x["answer"] for x in setup.asked[start * BATCH : (start + BLOCK) * BATCH]]
        done = pickle.loads(path.read_bytes()) if path.exists() else {}
        missing = {name: asked[name] for name in first.values() if name not in done}
        if missing:
            result = lp_patch.evaluate(
                setup.model,
                some,
                missing,
                labels=labels,
                decode=lambda ids: words.decode(ids, skip_special_tokens=True),
                max_new_tokens=3,
            )
            done |= {x.name: x for x in result.outcomes}
            path.write_bytes(pickle.dumps(done))
        for name in ("full", *asked):
            found.setdefault(name, []).append(done[first.get(name, name)])
        outcomes = [
            Outcome(name, parts[0].settings, *(np.concatenate([getattr(x, y) for x in parts]) for y in MEASURED))
            for name, parts in found.items()
        ]
        outcomes += [cut(x, len(outcomes[0].scores)) for x in beside]
        yield lp_patch.Evaluation("accuracy", tuple(outcomes), 0.95)


def verdict(result: lp_patch.Evaluation) -> str:
    """The comparisons that the note speaks of, in points."""
    pairs = (
        ("calibrated", "default"),
        ("calibrated", "default, rounded down"),
        ("calibrated", "stage 1 alone"),
        ("default, rounded down", "stage 1 alone"),
        ("default", "stage 1 alone, a token more"),
        ("default", "default, rounded down"),
    )
    names, lines = {x.name for x in result.outcomes}, []
    for scorer in SCORERS:
        for tokens in BUDGETS:
            for one, other in pairs:
                start = f"{scorer} {tokens}: "
                if not {start + one, start + other} <= names:
                    continue
                gap = [100 * x for x in result.difference(start + one, start + other)]
                lines.append("{:<62} {:+5.1f} ({:+.1f} to {:+.1f})".format(f"{start}{one} - {other}", *gap))
    return "\n".join(lines)


def ship(found: dict[str, dict], folder: Path) -> None:
    """Put what was found into the pruner of a folder."""
    pruner = lp_patch.LearnablePruner.from_pretrained(folder)
    for name, one in found.items():
        if not name.startswith("diversity"):
            pruner.recommended = merged(pruner.recommended, one["recommendation"])
    pruner.save_pretrained(folder)


def about(dtype: str) -> dict[str, str]:
    """What each row says of the run that made it."""
    return {
        "dtype": dtype,
        "device": "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lp_patch": lp_patch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
    }


def main() -> None:
    """Calibrate, evaluate, compare; or ship what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TESTBED / "model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to ask")
    parser.add_argument("--only-evaluate", action="store_true", help="no calibration that is not made yet")
    parser.add_argument("--trained", action="store_true", help="calibrate on photographs that the model was trained on")
    parser.add_argument("--seed", type=int, default=99, help="of the scenes to calibrate on")
    parser.add_argument("--limit", type=int, help="ask about so many pictures of the evaluation")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ship", type=Path, metavar="FOLDER", help="only put what was found into this pruner")
    args = parser.parse_args()
    path = args.output.with_suffix(".json")
    if args.ship:
        ship(json.loads(path.read_text()), args.ship)
        return
    torch.set_num_threads(1)
    args.model = Path(os.path.relpath(args.model))  # the CSV names it
    name = f"calibration_{args.seed}{'_trained' * args.trained}"
    scenes = build(name, SCENES, args.seed, Style(held_out=not args.trained))
    setup = Setup(args.model, getattr(torch, args.dtype), args.limit, scenes)
    found = json.loads(path.read_text()) if args.only_evaluate else calibrate(setup, args.model, path)
    run = about(args.dtype)
    beside = known(setup, STUDIES["smollm" if "smollm" in args.model.name else "model"].path)
    asked = settings(args.model, found, args.rows)
    for result in evaluate(setup, asked, beside, RUNS / "calibration" / args.output.stem):
        print(result, verdict(result), sep="\n\n", flush=True)
        result.save(args.output, **run)


if __name__ == "__main__":
    main()
