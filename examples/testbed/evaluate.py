"""Measure the testbed model through the library: accuracy by split, method, budget and question type.

Run ``PYTHONPATH=. python examples/testbed/evaluate.py`` from the repository root; it writes ``results.csv``
and the tables of README.md.  ``--tables`` rewrites the tables from the CSV alone.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import ModelOutput

HERE = Path(__file__).resolve().parent
SPLITS = ("seen_styles", "unseen_style")
METHODS = ("random", "uniform", "cls", "diversity")
ORACLE = "oracle"
"""Knows the true object patches: keeps them, drawn evenly where they are too many, then random others."""
BUDGETS = (192, 128, 64, 32, 16)
TYPES = ("all", "existence", "existence yes", "existence no", "count", "what", "where", "colour")
BLIND = ("grey picture", "wrong picture")
FIELDS = (
    "split",
    "method",
    "stage2",
    "tokens",
    "type",
    "n",
    "correct",
    "accuracy",
    "low",
    "high",
    "foreground_recall",
    "relevant_recall",
    "seed",
    "model_sha256",
    "dtype",
    "torch",
    "transformers",
    "lp_patch",
)


@dataclass(frozen=True)
class Run:
    """One way of answering: a method and a budget."""

    method: str
    tokens: int
    stage2: bool = False

    def options(self, seed: int) -> dict:
        """Options for the library; the plain baselines get no diversity share."""
        ratio = 3.0 if self.stage2 else 1.0
        options = {"tokens": self.tokens, "scorer": self.method, "stage_ratio": ratio, "seed": seed}
        if self.method != "diversity":
            options["diversity"] = 0.0
        return options

    @property
    def pruned(self) -> bool:
        """Whether the library takes part."""
        return self.method in METHODS or self.method == ORACLE


RUNS = [
    Run("full", 576),
    *(Run(name, 576) for name in BLIND),
    *(Run(method, tokens, stage2) for method in METHODS for tokens in BUDGETS for stage2 in (False, True)),
    *(Run(ORACLE, tokens) for tokens in BUDGETS),
]


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    z = 1.959964
    share = correct / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return middle - half, middle + half


def _spread(value: object, rows: Tensor) -> object:
    """Repeat the rows of every tensor in a nest of tuples and dictionaries."""
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, dict):
        return {key: _spread(part, rows) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_spread(part, rows) for part in value)
    return value


@contextmanager
def remembered_vision(model: LlavaForConditionalGeneration, attention: bool) -> Iterator[None]:
    """Encode each picture of a batch once for all its questions and runs: the same results, only sooner.

    With ``attention`` the attention of the feature layer is computed again on its remembered input, because
    the library reads it there for the scorer "cls".
    """
    tower = model.model.vision_tower
    block = getattr(tower, "vision_model", tower).encoder.layers[model.config.vision_feature_layer].self_attn
    memory = model.__dict__.setdefault("_testbed_memory", {})
    original = type(tower).forward

    def encode(pixels: Tensor, options: dict) -> tuple[ModelOutput, tuple, dict]:
        seen: list[tuple[tuple, dict]] = []
        handle = block.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        _, rows = torch.unique(pixels[:, :, ::16, ::16].flatten(1), dim=0, return_inverse=True)
        first = [rows.tolist().index(row) for row in range(int(rows.max()) + 1)]
        output = original(tower, pixels[first], **options)
        handle.remove()
        args, kwargs = seen[0]
        return type(output)(**_spread(dict(output), rows)), _spread(args, rows), _spread(kwargs, rows)

    def forward(pixel_values: Tensor, **options: object) -> ModelOutput:
        key = pixel_values.data_ptr()
        if key not in memory:
            memory[key] = encode(pixel_values, options)
        output, args, kwargs = memory[key]
        if attention:
            block(*args, **kwargs)
        return copy(output)

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward


class Evaluation:
    """The model, the questions and the tallies."""

    def __init__(self, folder: Path, limit: int | None, seed: int, dtype: torch.dtype) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        content = json.loads((HERE / "evaluation" / "questions.json").read_text())
        self.foreground = content["foreground"]
        self.questions = content["questions"]
        self.limit = limit
        self.seed = seed
        self.counts: dict[tuple[str, Run, str], list[float]] = {}

    def know(self, asked: list[dict], seed: int) -> None:
        """Tell the library's catalogue about the true object patches of a batch, as one more scorer."""
        from lp_patch import strategies

        scores = torch.rand(len(asked), 576, generator=torch.Generator().manual_seed(seed))
        for row, question in enumerate(asked):
            scores[row, self.foreground[question["picture"]]] += 1
        strategies.SCORERS[ORACLE] = strategies.Scorer(ORACLE, "the testbed's labels", lambda given: scores)

    def batches(self, split: str, pictures: int = 8) -> Iterator[tuple[list[dict], dict[str, dict]]]:
        """Questions of a few pictures, with inputs for the true, the grey and a wrong picture."""
        names = sorted({question["picture"] for question in self.questions if question["split"] == split})
        names = names[: self.limit]
        opened = {name: Image.open(HERE / "evaluation" / "pictures" / name).convert("RGB") for name in names}
        following = dict(zip(names, names[1:] + names[:1], strict=True))
        for start in range(0, len(names), pictures):
            chosen = set(names[start : start + pictures])
            asked = [question for question in self.questions if question["picture"] in chosen]
            prompts = [f"USER: <image>\n{question['question']} ASSISTANT:" for question in asked]

            def inputs(of: list[Image.Image], texts: list[str] = prompts) -> dict:
                batch = self.processor(images=of, text=texts, padding=True, return_tensors="pt")
                batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
                return dict(batch)

            true = inputs([opened[question["picture"]] for question in asked])
            wrong = inputs([opened[following[question["picture"]]] for question in asked])
            grey = {**true, "pixel_values": torch.zeros_like(true["pixel_values"])}
            yield asked, {"true": true, BLIND[0]: grey, BLIND[1]: wrong}

    @torch.inference_mode()
    def answer(self, run: Run, asked: list[dict], inputs: dict[str, dict], seed: int) -> None:
        """Answer a batch in one way and add to the tallies."""
        batch = inputs.get(run.method, inputs["true"])
        pruning = nullcontext()
        if run.pruned:
            import lp_patch

            if run.method == ORACLE:
                self.know(asked, seed)
            pruning = lp_patch.applied(self.model, **run.options(seed))
        with remembered_vision(self.model, run.method == "cls"), pruning as patch:
            output = self.model.generate(**batch, max_new_tokens=3, do_sample=False)
            trace = patch.trace if patch else None
        texts = self.processor.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, (question, text) in enumerate(zip(asked, texts, strict=True)):
            correct = text.strip() == question["answer"]
            recall = relevant = None
            if trace is not None:
                first = set(trace.stage1[row].tolist())
                last = set(trace.stage2[row].tolist())
                solid = self.foreground[question["picture"]]
                recall = len(first.intersection(solid)) / len(solid)
                if question["relevant"]:
                    relevant = len(last.intersection(question["relevant"])) / len(question["relevant"])
            kinds = ["all", question["type"]]
            if question["type"] == "existence":
                kinds.append(f"existence {question['answer']}")
            for kind in kinds:
                entry = self.counts.setdefault((question["split"], run, kind), [0, 0, 0.0, 0, 0.0, 0])
                entry[0] += 1
                entry[1] += correct
                for place, value in ((2, recall), (4, relevant)):
                    if value is not None:
                        entry[place] += value
                        entry[place + 1] += 1

    def measure(self, split: str, runs: list[Run], part: int = 0, parts: int = 1) -> None:
        """All runs on every ``parts``-th batch of a split."""
        began = time.time()
        for number, (asked, inputs) in enumerate(self.batches(split)):
            if number % parts != part:
                continue
            for run in runs:
                self.answer(run, asked, inputs, self.seed + number)
            self.model.__dict__.get("_testbed_memory", {}).clear()
            print(f"{split}: batch {number + 1}, {time.time() - began:.0f} s", flush=True)

    def rows(self, folder: Path) -> Iterator[dict]:
        """The rows of the CSV."""
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        try:
            from lp_patch import __version__ as version
        except ImportError:
            version = "source tree"
        common = {
            "seed": self.seed,
            "model_sha256": digest[:16],
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lp_patch": version,
        }
        for (split, run, kind), (n, correct, recall, seen, relevant, known) in self.counts.items():
            low, high = wilson(correct, n)
            yield {
                "split": split,
                "method": run.method,
                "stage2": "yes" if run.stage2 else "no",
                "tokens": run.tokens,
                "type": kind,
                "n": n,
                "correct": correct,
                "accuracy": round(correct / n, 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "foreground_recall": round(recall / seen, 4) if seen else "",
                "relevant_recall": round(relevant / known, 4) if known else "",
                **common,
            }


def work(job: tuple[argparse.Namespace, str, list[Run], int]) -> dict:
    """One process's share of a split."""
    args, split, runs, part = job
    torch.set_num_threads(args.threads)
    evaluation = Evaluation(args.model, args.limit, args.seed, getattr(torch, args.dtype))
    evaluation.measure(split, runs, part, args.workers)
    return evaluation.counts


def measure(args: argparse.Namespace) -> None:
    """Measure everything asked for; the CSV is brought up to date after each split."""
    evaluation = Evaluation(args.model, args.limit, args.seed, getattr(torch, args.dtype))
    for split in args.splits:
        runs = [run for run in RUNS if args.methods is None or run.method in args.methods]
        runs = [run for run in runs if run.tokens in args.budgets]
        jobs = [(args, split, runs, part) for part in range(args.workers)]
        with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
            for counts in pool.map(work, jobs):
                for key, entry in counts.items():
                    total = evaluation.counts.setdefault(key, [0] * len(entry))
                    evaluation.counts[key] = [sum(pair) for pair in zip(total, entry, strict=True)]
        merge(args.output, list(evaluation.rows(args.model)))


def merge(path: Path, rows: list[dict]) -> None:
    """Put rows in the CSV; they replace earlier rows of the same runs and all rows of other weights."""
    names = ("split", "method", "stage2", "tokens", "type")
    found: dict[tuple[str, ...], dict] = {}
    if path.exists():
        with path.open() as file:
            for row in csv.DictReader(file):
                if row["model_sha256"] == rows[0]["model_sha256"]:
                    found[tuple(row[name] for name in names)] = row
    for row in rows:
        found[tuple(str(row[name]) for name in names)] = row
    order = {(run.method, str(run.tokens), "yes" if run.stage2 else "no"): i for i, run in enumerate(RUNS)}

    def place(row: dict) -> tuple[int, int, int]:
        run = order[row["method"], str(row["tokens"]), row["stage2"]]
        return SPLITS.index(row["split"]), run, TYPES.index(row["type"])

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(found.values(), key=place))


def percent(row: dict | None) -> str:
    """A share as a percentage, or a dash."""
    return f"{100 * float(row['accuracy']):.1f}" if row else "-"


def tables(path: Path) -> str:
    """The Markdown tables of the README, from the CSV alone."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        found[row["split"], row["method"], row["stage2"], int(row["tokens"]), row["type"]] = row
    lines = ["### Full picture against no picture, by question type", ""]
    lines += ["| questions | input | " + " | ".join(TYPES) + " |", "|---|---|" + "---:|" * len(TYPES)]
    for split in SPLITS:
        for method in ("full", *BLIND):
            cells = [percent(found.get((split, method, "no", 576, kind))) for kind in TYPES]
            lines.append(f"| {split.replace('_', ' ')} | {method} | " + " | ".join(cells) + " |")
        counts = [found.get((split, "full", "no", 576, kind)) for kind in TYPES]
        numbers = [row["n"] if row else "-" for row in counts]
        lines.append(f"| {split.replace('_', ' ')} | questions | " + " | ".join(numbers) + " |")
    for split in SPLITS:
        full = found.get((split, "full", "no", 576, "all"))
        if full is None:
            continue
        interval = f"{100 * float(full['low']):.1f} to {100 * float(full['high']):.1f}"
        lines += ["", f"### Accuracy by method and average number of tokens, {split.replace('_', ' ')}", ""]
        lines += [f"All 576 tokens: {percent(full)} (95 % interval {interval}, n = {full['n']}).", ""]
        for stage2, title in (("no", "Stage 1 alone"), ("yes", "Stage 1 and stage 2")):
            lines += [
                f"| {title} | " + " | ".join(map(str, BUDGETS)) + " |",
                "|---|" + "---:|" * len(BUDGETS),
            ]
            for method in (*METHODS, ORACLE) if stage2 == "no" else METHODS:
                cells = [percent(found.get((split, method, stage2, tokens, "all"))) for tokens in BUDGETS]
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
            lines.append("")
        lines += ["Per cent of the object patches that survive stage 1 / of the patches that the question is"]
        lines += ["about that survive to the end:", ""]
        for stage2, title in (("no", "Stage 1 alone"), ("yes", "Stage 1 and stage 2")):
            lines += [
                f"| {title} | " + " | ".join(map(str, BUDGETS)) + " |",
                "|---|" + "---:|" * len(BUDGETS),
            ]
            for method in (*METHODS, ORACLE) if stage2 == "no" else METHODS:
                cells = []
                for tokens in BUDGETS:
                    row = found.get((split, method, stage2, tokens, "all"))
                    shares = [row[key] for key in ("foreground_recall", "relevant_recall")] if row else []
                    cells.append(" / ".join(f"{100 * float(share):.0f}" for share in shares) or "-")
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
            lines.append("")
    lines += ["### By question type at 64 and 32 tokens, stage 1 alone, seen styles", ""]
    lines += ["| method | tokens | " + " | ".join(TYPES) + " |", "|---|---:|" + "---:|" * len(TYPES)]
    for tokens in (64, 32):
        for method in (*METHODS, ORACLE):
            cells = [percent(found.get((SPLITS[0], method, "no", tokens, kind))) for kind in TYPES]
            lines.append(f"| {method} | {tokens} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_tables(path: Path) -> None:
    """Put the tables between the marks in README.md."""
    readme = HERE / "README.md"
    text = readme.read_text()
    before, rest = text.split("<!-- tables: begin -->")
    after = rest.split("<!-- tables: end -->")[1]
    content = f"{before}<!-- tables: begin -->\n{tables(path)}\n<!-- tables: end -->{after}"
    readme.write_text(content)


def main() -> None:
    """Measure, or only rewrite the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--output", type=Path, default=HERE / "results.csv")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="a process")
    parser.add_argument("--limit", type=int, help="pictures a split, for a quick look")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--methods", nargs="+", help="only these methods")
    parser.add_argument("--budgets", nargs="+", type=int, default=(576, *BUDGETS), help="only these")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tables", action="store_true", help="only rewrite the tables")
    args = parser.parse_args()
    if not args.tables:
        measure(args)
    if args.output == HERE / "results.csv":
        write_tables(args.output)
    else:
        print(tables(args.output))


if __name__ == "__main__":
    main()
