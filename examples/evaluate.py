"""Evidence: what pruning costs the testbed model, by question type, budget and method, through lp_patch's public API.

    PYTHONPATH=. python examples/evaluate.py                            # group "main" without trained weights
    PYTHONPATH=. python examples/evaluate.py --groups main ladder --pruners seed0=FOLDER seed1=FOLDER seed2=FOLDER
    PYTHONPATH=. python examples/evaluate.py --tables                   # tables and plot again, from the CSV

A cell is one method at one budget, asked every question of a split: greedy, fp32, exact match. Cells that the CSV holds
for the same weights are skipped, each new one is written at once; one run at a time per CSV. A trained pruner's label
carries its seed: "seed0" is seed 0 of "learned", "x-seed0" of the variant "x". ``retention.py`` explains the answers.
Weights of another kind than "learned" answer in the group "neighbours", under the strategy that reads them.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from benchmark import device_name
from peft import PeftModel
from PIL import Image
from retention import (
    ALONE,
    BLIND,
    BUDGETS,
    COLUMNS,
    DIVERSITIES,
    LAYERS,
    NO_STAGE_1,
    ORACLE,
    RESULTS,
    SPLITS,
    TESTBED,
    TYPES,
    Cell,
    base,
    depths,
    digest,
    kinds,
    load,
    publish,
    questions,
    save,
    spread_cls,
    text_mode,
    to_hex,
    wilson,
)
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import lp_patch
from lp_patch import strategies
from lp_patch.pruner import Pruner

TOKENS = 576  # of the testbed's pictures
LORA = "adapter_model.safetensors"
PICTURES = 8  # encoded and asked about at once; "random" draws anew for each batch

# ---------------------------------------------------------------------- what is measured


def main_group(learned: list[Cell], layers: int = LAYERS) -> list[Cell]:
    """Every strategy of the catalogue and every pruner, alone and with text; what bounds them; no stage 1 at all."""
    names = [x.name for x in strategies.SCORERS.values() if not (x.needs_pruner or x.keeps_all or x.name == ORACLE)]
    starts = [*map(base, names), spread_cls(), *trained(learned)]
    cells = [replace(x, tokens=t, **mode) for x in starts for t in BUDGETS for mode in (ALONE, text_mode(layers))]
    cells += [replace(base(ORACLE), tokens=t) for t in BUDGETS] + [Cell(name) for name in BLIND]
    # after one whole layer, the earliest cut; it costs an average of TOKENS / layers, which the budget must exceed
    whole = [Cell(NO_STAGE_1, tokens=t, stage_ratio=None, layer=1) for t in BUDGETS if t > TOKENS / layers]
    return cells + [replace(x, text_scorer=name) for name in strategies.TEXT_SCORERS for x in whole]


def ladder(learned: list[Cell], layers: int = LAYERS) -> list[Cell]:
    """[CLS] attention; the trained module instead; text attention on top, at equal budgets."""
    steps = [base("cls"), *learned, *(replace(x, **text_mode(layers)) for x in learned)]
    return [replace(x, tokens=t) for x in steps for t in BUDGETS]


def training(learned: list[Cell], layers: int = LAYERS) -> list[Cell]:
    """Pruners of other data and objectives."""
    modes = ALONE, text_mode(layers)
    return [replace(x, tokens=t, **mode) for x in trained(learned) for t in (64, 32, 16) for mode in modes]


def neighbours(others: list[Cell], layers: int = LAYERS) -> list[Cell]:
    """Weights of other kinds, each under its own strategy."""
    return [replace(x, tokens=t, **mode) for x in others for t in (64, 32, 16) for mode in (ALONE, text_mode(layers))]


def trained(learned: list[Cell]) -> list[Cell]:
    """The pruners under every strategy that reads one."""
    names = [x.name for x in strategies.SCORERS.values() if x.needs_pruner and x.kind == lp_patch.LearnablePruner.kind]
    return [base(name, x.pruner) for name in names for x in learned]


Group = Callable[[list[Cell], int], list[Cell]]


def sweep(settings: Callable[[int], list[dict]], extra: str) -> Group:
    """Variants of the full method at 64 and 32 tokens, for the pruners and one more scorer; settings by depth."""

    def cells(learned: list[Cell], layers: int = LAYERS) -> list[Cell]:
        full = [{**text_mode(layers), **setting, "tokens": t} for setting in settings(layers) for t in (64, 32)]
        return [replace(x, **options) for x in [base(extra), *learned] for options in full]

    return cells


TEXT_SCORERS = [{"text_scorer": x.name} for x in strategies.TEXT_SCORERS.values() if not x.alone]
GROUPS: dict[str, Group] = {
    "main": main_group,
    "ladder": ladder,
    "layer": sweep(lambda layers: [{"layer": k} for k in depths(layers)], "diversity"),
    "ratio": sweep(lambda layers: [ALONE, *({"stage_ratio": r} for r in (1.5, 2.0, 3.0, 4.0))], "diversity"),
    "diversity": sweep(
        lambda layers: [{**m, "diversity": x} for m in (ALONE, text_mode(layers)) for x in DIVERSITIES], "cls"
    ),
    "text": sweep(lambda layers: TEXT_SCORERS, "diversity"),
    "training": training,
    "neighbours": neighbours,
}


def options(cell: Cell) -> dict:
    """What the library is asked for; nothing where it takes no part."""
    if cell.scorer in ("full", *BLIND):
        return {}
    return {name: value for name, value in asdict(cell).items() if value is not None}


# ---------------------------------------------------------------------- how


class RememberedTower:
    """In place of the vision tower: each picture is encoded once, then its number stands for its pixels.

    lp_patch looks into an attention through its config, and what it is given with a hook. One that it looks into runs
    again, on its remembered input.
    """

    def __init__(self, model: LlavaForConditionalGeneration, batches: list[Tensor]) -> None:
        tower = model.model.vision_tower
        self.layers = getattr(tower, "vision_model", tower).encoder.layers
        self.configs = [layer.self_attn.config for layer in self.layers]
        self.feature = range(len(self.layers) + 1)[model.config.vision_feature_layer]
        encoded = [tower(pixels, output_hidden_states=True).hidden_states for pixels in batches]
        self.states = [torch.cat(parts) for parts in list(zip(*encoded, strict=True))[: self.feature + 1]]
        tower.forward = self.recall

    def recall(self, pixel_values: Tensor, **asked: object) -> BaseModelOutputWithPooling:
        """The feature layer of the pictures with these numbers (B,)."""
        for layer, config, state in zip(self.layers, self.configs, self.states, strict=False):
            if layer.self_attn.config is not config or layer.self_attn._forward_pre_hooks:
                layer.self_attn(layer.layer_norm1(state[pixel_values]), attention_mask=None)
        states: list[Tensor | None] = [None] * (len(self.layers) + 1)
        states[self.feature] = self.states[self.feature][pixel_values]
        return BaseModelOutputWithPooling(hidden_states=tuple(states))


@dataclass(frozen=True)
class Batch:
    """The questions on a few pictures.

    Attributes:
        pictures: numbers of these pictures, and in `following` of the next picture of each.
        rows: for each question its place among them.
        prompt: token ids and mask, padded on the left.
    """

    asked: list[dict]
    pictures: list[int]
    following: list[int]
    rows: list[int]
    prompt: dict[str, Tensor]


class Testbed:
    """The model with its pictures encoded, and the questions."""

    def __init__(
        self,
        folder: Path,
        pruners: dict[str, Path],
        splits: tuple[str, ...] = SPLITS,
        limit: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        lora: Path | None = None,
    ) -> None:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        if lora is not None:
            model = PeftModel.from_pretrained(model, str(lora)).merge_and_unload()
        self.model = model.eval().to(device)
        self.layers = self.model.config.text_config.num_hidden_layers
        self.processor = AutoProcessor.from_pretrained(folder)
        self.pruners = {label: Pruner.from_pretrained(path) for label, path in pruners.items()}
        self.foreground = questions("foreground")
        self.names = [name for split in splits for name in pictures(split, limit)]
        self.batches = {split: list(self._batches(pictures(split, limit))) for split in splits}
        with torch.inference_mode():
            RememberedTower(self.model, list(self._pixels()))

    def _pixels(self) -> Iterator[Tensor]:
        """The pictures in the order of their numbers, a few at a time, and last the grey one."""
        for start in range(0, len(self.names), PICTURES):
            paths = [TESTBED / "evaluation" / "pictures" / name for name in self.names[start : start + PICTURES]]
            images = [Image.open(path).convert("RGB") for path in paths]
            pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
            yield pixels.to(self.model.device, self.model.dtype)
        yield torch.zeros_like(pixels[:1]).to(self.model.device, self.model.dtype)

    def _batches(self, names: list[str]) -> Iterator[Batch]:
        """The questions on these pictures, in the order of `questions.json`."""
        following = dict(zip(names, names[1:] + names[:1], strict=True))
        for start in range(0, len(names), PICTURES):
            some = names[start : start + PICTURES]
            asked = [x for x in questions() if x["picture"] in some]
            texts = [f"USER: {'<image>' * TOKENS}\n{x['question']} ASSISTANT:" for x in asked]
            yield Batch(
                asked,
                [self.names.index(name) for name in some],
                [self.names.index(following[name]) for name in some],
                [some.index(x["picture"]) for x in asked],
                dict(self.processor.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)),
            )

    @torch.inference_mode()
    def answer(self, cell: Cell, split: str, number: int) -> tuple[list[str], lp_patch.Trace | None]:
        """The answers to batch `number` of a split, and what was pruned."""
        batch = self.batches[split][number]
        grey = [len(self.names)] * len(batch.pictures)
        shown = {BLIND[0]: grey, BLIND[1]: batch.following}.get(cell.scorer, batch.pictures)
        given = options(replace(cell, seed=cell.seed + number))
        if "pruner" in given:
            given["pruner"] = self.pruners[given["pruner"]]
        if cell.scorer == ORACLE:
            self._tell(batch, given["seed"])
        with lp_patch.applied(self.model, **given) if given else nullcontext() as patch:
            # stage 1 sees each picture once, its questions share what is left
            numbers = torch.tensor(shown, device=self.model.device)
            features = self.model.get_image_features(numbers, return_dict=True)
            features.pooler_output = [features.pooler_output[row] for row in batch.rows]
            encoded = {"image": features}
            output = self.model.generate(**batch.prompt, mm_encoder_outputs=encoded, max_new_tokens=3, do_sample=False)
            trace = patch.trace if patch else None
        new = output[:, batch.prompt["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)], trace

    def _tell(self, batch: Batch, seed: int) -> None:
        """Put the true object patches of a batch into the catalogue, as one more scorer."""
        scores = torch.rand(len(batch.pictures), TOKENS, generator=torch.Generator().manual_seed(seed))
        for row, picture in enumerate(batch.pictures):
            scores[row, self.foreground[self.names[picture]]] += 1
        scores = scores.to(self.model.device)
        scorer = strategies.Scorer(ORACLE, "the testbed's labels", score=lambda given: scores)
        strategies.SCORERS[ORACLE] = scorer

    def measure(self, cell: Cell, split: str) -> dict:
        """The measured columns of a row."""
        right: dict[str, bool] = {}
        types: dict[str, list[bool]] = {kind: [] for kind in TYPES}
        average, foreground, relevant = [], [], []
        for number, batch in enumerate(self.batches[split]):
            texts, trace = self.answer(cell, split, number)
            for row, (question, text) in enumerate(zip(batch.asked, texts, strict=True)):
                right[question["id"]] = text == question["answer"]
                for kind in kinds(question):
                    types[kind].append(right[question["id"]])
                if trace is not None:
                    average.append(sum(trace.tokens_per_layer[row]) / self.layers)
                    if trace.mixtures[row] is None:  # of mixtures none is kept
                        foreground.append(recall(trace.stage1[row], self.foreground[question["picture"]]))
                        relevant.append(recall(trace.stage2[row], question["relevant"]))
        correct = [right[x["id"]] for x in questions() if x["id"] in right]
        low, high = wilson(sum(correct), len(correct))
        return {
            "average": rounded(average or [float(TOKENS)]),
            "n": len(correct),
            "correct": sum(correct),
            "accuracy": rounded(correct),
            "low": round(low, 4),
            "high": round(high, 4),
            **{kind: rounded(values) for kind, values in types.items()},
            "foreground_recall": rounded(foreground),
            "relevant_recall": rounded([x for x in relevant if x is not None]),
            "answers": to_hex(correct),
        }


def recall(kept: Tensor, wanted: list[int]) -> float | None:
    """The share of the wanted patches that is kept; None where none is wanted."""
    return len(set(kept.tolist()).intersection(wanted)) / len(wanted) if wanted else None


def rounded(values: list) -> float | str:
    """A mean for the CSV, empty without values."""
    return round(sum(values) / len(values), 4) if values else ""


# ---------------------------------------------------------------------- the run


def pictures(split: str, limit: int | None) -> list[str]:
    """The split's pictures, by name."""
    return sorted({x["picture"] for x in questions() if x["split"] == split})[:limit]


def wanted(args: argparse.Namespace) -> list[Cell]:
    """The cells asked for, the full model's first: all others are relative to it."""
    cells = [base(Pruner.from_pretrained(folder).kind, label) for label, folder in args.pruners.items()]
    learned = [x for x in cells if x.scorer == lp_patch.LearnablePruner.kind]
    others = [x for x in cells if x not in learned]
    found = [Cell("full")]
    for name in args.groups:
        given = others if name == "neighbours" else learned
        cells = [cell for cell in GROUPS[name](given, args.layers) if cell.tokens in (*args.budgets, TOKENS)]
        if not cells:
            raise SystemExit(f"group {name!r} has no cell here: add --pruners LABEL=FOLDER ..., or other --budgets")
        found += cells
    return [replace(cell, seed=args.seed) for cell in dict.fromkeys(found)]


NAMES = tuple(x.name for x in fields(Cell))


def identity(row: dict) -> tuple[str, ...]:
    """What a row is about; a CSV holds one row of each."""
    return tuple("" if row[name] is None else str(row[name]) for name in ("split", *NAMES))


TESTBEDS: list[Testbed] = []  # a worker's own


def start(args: argparse.Namespace) -> None:
    """A worker's first act."""
    torch.set_num_threads(args.threads)
    TESTBEDS.append(
        Testbed(args.model, args.pruners, args.splits, args.limit, getattr(torch, args.dtype), args.device, args.lora)
    )


def work(cell: Cell, split: str) -> tuple[dict, float]:
    """One cell's measured columns, and the seconds that it took."""
    began = time.perf_counter()
    return TESTBEDS[0].measure(cell, split), time.perf_counter() - began


def measure(args: argparse.Namespace) -> None:
    """Measure what the CSV does not hold yet."""
    common = {
        "model_sha256": digest(args.model / "model.safetensors")
        + (f"+{digest(args.lora / LORA)}" if args.lora else ""),
        "dtype": args.dtype,
        "device": device_name(args.device) + (", CPU" if args.device == "cpu" else ""),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lp_patch": lp_patch.__version__,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "examples/evaluate.py", *sys.argv[1:]]).replace(f"{Path.cwd()}/", ""),
    }
    hashes = {label: digest(folder / "model.safetensors") for label, folder in args.pruners.items()}
    sizes = {split: sum(x["picture"] in pictures(split, args.limit) for x in questions()) for split in SPLITS}
    weights = ("pruner_sha256", "model_sha256", "dtype", "n")
    todo = []
    cells = wanted(args)
    held = {identity(row): row for row in load(args.output)}
    for cell in cells:
        for split in args.splits:
            row = {"split": split, **asdict(cell), "pruner_sha256": hashes.get(cell.pruner, ""), **common}
            old = held.get(identity(row))
            same = old and [old[x] for x in weights] == [str({**row, "n": sizes[split]}[x]) for x in weights]
            if not (same and old["answers"]):  # rows from before answers were kept are measured again
                todo.append((cell, split, row))
    print(f"{len(cells) * len(args.splits)} cells, {len(todo)} to measure", flush=True)
    if not todo:
        return
    pool = ProcessPoolExecutor(min(args.workers, len(todo)), get_context("spawn"), start, (args,))
    try:
        jobs = {pool.submit(work, cell, split): row for cell, split, row in todo}
        for done, job in enumerate(as_completed(jobs), 1):
            row, (measured, seconds) = jobs[job], job.result()
            record(args.output, {**row, **measured})
            what = ", ".join(f"{name} {row[name]}" for name in ("split", *NAMES) if row[name] is not None)
            share = measured["correct"] / measured["n"]
            print(f"[{done}/{len(todo)}] {100 * share:.1f} % in {seconds:.1f} s: {what}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)


def record(path: Path, row: dict) -> None:
    """Put a row in the CSV in place of an earlier one of its cell; rows of other weights of the model go."""
    rows = load(path)
    for old in rows:
        if identity(old) == identity(row) and old["n"] == str(row["n"]) and old["correct"] != str(row["correct"]):
            print(f"replaces {old['correct']} right of {old['n']}, now {row['correct']}: {identity(row)}", flush=True)
    kept = [x for x in rows if identity(x) != identity(row) and x["model_sha256"] == row["model_sha256"]]
    if foreign := sum(x["model_sha256"] != row["model_sha256"] for x in rows):
        print(f"dropped {foreign} rows of other weights of the model", flush=True)
    save(path, [*kept, {name: str("" if row.get(name) is None else row[name]) for name in COLUMNS}])


def labelled(text: str) -> tuple[str, Path]:
    """LABEL=FOLDER."""
    label, _, folder = text.partition("=")
    if not label or not (Path(folder) / "model.safetensors").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=FOLDER with a pruner in the folder")
    return label, Path(folder)


def main() -> None:
    """Measure, then tables and plot; or these alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["main"])
    parser.add_argument("--pruners", nargs="+", type=labelled, default=[], metavar="LABEL=FOLDER")
    parser.add_argument("--budgets", nargs="+", type=int, choices=BUDGETS, default=BUDGETS)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--model", type=Path, default=TESTBED / "model")
    parser.add_argument("--lora", type=Path, help="folder of LoRA weights for the language model, merged in")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, default=0, help="for strategies that draw")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--limit", type=int, help="pictures a split, for a quick look; needs another --output")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--tables", action="store_true", help="no measuring")
    args = parser.parse_args()
    args.pruners = dict(args.pruners)
    if args.limit and args.output == RESULTS:
        parser.error("--limit needs --output: a part of the questions must not replace all of them")
    args.layers = AutoConfig.from_pretrained(args.model).text_config.num_hidden_layers
    if not args.tables:
        measure(args)
    publish(args.output, args.layers)


if __name__ == "__main__":
    main()
