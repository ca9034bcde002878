"""What should stage 2 rank tokens by? Candidates against the mean attention of the text, on the testbeds.

    python examples/testbed/text_scores.py examples/testbed/model --output examples/results/text_scores.csv
    python examples/testbed/text_scores.py examples/testbed/model --set evaluation --only text sharp_heads --output ...

Stage 1 and the decoder layers up to k run once a question; each candidate then chooses R2 of the R1 survivors, and the
layers after k run on its choice. An answer is right if each of its tokens is the most probable one after those before
it, which is what greedy decoding would write; `loss` is its negative log-likelihood. The watched set is made of the
scenes that training looks at from time to time; ``--set evaluation`` of the pictures behind every table. Differences
to `text` are paired by question. The candidates of `BOUNDS` know what no strategy knows.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import questions
import torch
from PIL import Image
from scenes import IGNORE, Style, build
from text_candidates import BOUNDS, CANDIDATES, Seen, bounds
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lp_patch import LearnablePruner
from lp_patch.attention import Attended, install_tap
from lp_patch.budget import default_layer, stage_budget
from lp_patch.select import covering_points, farthest_points, take, top_indices

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from retention import difference

EVALUATION = Path(__file__).resolve().parent / "evaluation"
PATCHES = 576
PICTURES = 8  # at once
SCENES = 320  # that are watched
ELSEWHERE = 260  # from here on they say what attention a patch usually gets

# ---------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Asked:
    """One question: picture number, text, answer, the patches and the word that it is about (None: none)."""

    picture: int
    text: str
    answer: str
    relevant: list[int]
    pointer: str | None


def watched(count: int) -> tuple[list[Image.Image], list[Asked]]:
    """Scenes that training looks at but does not learn from, and six questions on each."""
    scenes = build("monitor", SCENES, 4, Style(held_out=True))
    asked = []
    for number, row in enumerate(questions.balanced(scenes.objects[:count], random.Random(7))):
        kinds, things = scenes.labels[number][:2]
        solid = (kinds > 0) & (kinds < IGNORE)
        for q in row:
            patches = np.flatnonzero(np.isin(things, [x + 1 for x in q.relevant]) & solid).tolist()
            asked.append(Asked(number, q.text, q.answer, patches, q.pointer))
    return [Image.fromarray(scenes.pictures[i]) for i in range(count)], asked


def evaluation(count: int) -> tuple[list[Image.Image], list[Asked]]:
    """The evaluation set's pictures in the styles of training."""
    rows = json.loads((EVALUATION / "questions.json").read_text())["questions"]
    names = sorted({x["picture"] for x in rows if x["split"] == "seen_styles"})[:count]
    asked = [
        Asked(names.index(x["picture"]), x["question"], x["answer"], x["relevant"], None)
        for x in rows
        if x["picture"] in names
    ]
    return [Image.open(EVALUATION / "pictures" / name).convert("RGB") for name in names], asked


SETS = {"watched": (watched, 60), "evaluation": (evaluation, 176)}
"""Where questions come from, and how many pictures there are by default."""

# ---------------------------------------------------------------------- the model, layer by layer


class Bench:
    """A testbed's model, cut open behind decoder layer k."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=args.dtype).eval()
        self.processor = AutoProcessor.from_pretrained(args.model)
        self.text = self.model.model.language_model
        self.k = args.layer or default_layer(len(self.text.layers))
        self.budget = stage_budget(args.tokens, PATCHES, len(self.text.layers), self.k, 3.0)
        self.scorer = args.scorer
        self.pruner = LearnablePruner.from_pretrained(args.model / "lp_patch_pruner")
        self.attended: dict[int, Attended] = {}
        for number, layer in enumerate(self.text.layers[: self.k]):
            install_tap(layer.self_attn, lambda _, seen, number=number: self.attended.__setitem__(number, seen))

    def encode(self, pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """Projected survivors of stage 1 (P, R1, D) in raster order, and (P, R1) in which patch, in stage 1's order."""
        pixels = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"].to(
            self.model.dtype
        )
        hidden = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        keep = self.budget.stage1
        if self.scorer == "covering":
            chosen = covering_points(hidden, self.pruner.score(hidden), keep)
        elif self.scorer == "learned":
            chosen = top_indices(self.pruner.score(hidden), keep)
        else:
            chosen = farthest_points(hidden, torch.empty(len(hidden), 0, dtype=torch.long), keep)
        return self.model.model.multi_modal_projector(take(hidden, chosen.sort(1).values)), chosen

    def tokens(self, asked: list[Asked]) -> tuple[Tensor, dict[str, Tensor]]:
        """The start (S,) of each prompt; of what follows the picture ids and masks (B, T): see `Seen`, and `answer`."""
        words = self.processor.tokenizer
        image = self.model.config.image_token_id
        rows = []
        for x in asked:
            prompt = f"USER: <image>\n{x.text} ASSISTANT:"
            ids = [*words(f"{prompt} {x.answer}").input_ids, words.eos_token_id]
            after = ids.index(image) + 1
            size, plain = len(words(prompt).input_ids), len(words("USER: <image>\n").input_ids)
            end = len(words(prompt.removesuffix(" ASSISTANT:")).input_ids)
            about = [False] * len(ids)
            if x.pointer:
                upto = prompt[: prompt.rindex(x.pointer)].rstrip()
                first = len(words(upto).input_ids)
                last = first + len(words(" " + x.pointer, add_special_tokens=False).input_ids)
                about[first:last] = [True] * (last - first)
            spots = range(len(ids))
            masks = {
                "asks": [i < size for i in spots],
                "template": [i < plain or i >= end for i in spots],
                "pointer": about,
                "answer": [i >= size for i in spots],
            }
            rows.append((ids[: after - 1], {"ids": ids[after:], **{name: m[after:] for name, m in masks.items()}}))
        longest = max(len(x["ids"]) for _, x in rows)
        padded = {
            name: torch.tensor([x[name] + [0] * (longest - len(x[name])) for _, x in rows]).to(
                torch.long if name == "ids" else torch.bool
            )
            for name in rows[0][1]
        }
        return torch.tensor(rows[0][0]), padded

    def start(self, visual: Tensor, places: Tensor, head: Tensor, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states (B, S + R1 + T, D) after layer k, and the rotary embedding of that sequence."""
        batch, text = ids.shape
        embed = self.text.embed_tokens
        hidden = torch.cat([embed(head).expand(batch, -1, -1), visual, embed(ids)], 1)
        s = len(head)
        after = torch.arange(s + PATCHES, s + PATCHES + text).expand(batch, -1)
        positions = torch.cat([torch.arange(s).expand(batch, -1), places + s, after], 1)
        rotary = self.text.rotary_emb(hidden, positions)
        return self.run(hidden, rotary, 0, self.k), rotary

    def run(self, hidden: Tensor, rotary: tuple[Tensor, ...], first: int, stop: int) -> Tensor:
        """Layers from `first` up to `stop` on (B, N, D): padded on the right, so being causal is mask enough."""
        for layer in self.text.layers[first:stop]:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, use_cache=False)
        return hidden

    def seen(self, start: int, count: int, masks: dict[str, Tensor]) -> list[Seen]:
        """What layers 1 to k showed; visual tokens are the `count` from `start` on."""
        found = []
        for number in range(self.k):
            x = self.attended[number]
            key = x.key.repeat_interleave(x.query.shape[1] // x.key.shape[1], 1)
            logits = x.query.float() @ key.float().transpose(2, 3) * x.scaling
            length = logits.shape[3]
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            weights = logits.masked_fill(~causal, -torch.inf).softmax(3)
            visual = slice(start, start + count)
            later = torch.arange(count, 0, -1)  # who sees a token, itself included
            found.append(
                Seen(
                    weights[:, :, start + count :, visual],
                    masks["asks"],
                    masks["template"],
                    masks["pointer"],
                    weights[:, :, visual, visual].sum(2).mean(1) / later,
                    x.key[:, :, visual].float(),
                    x.value[:, :, visual].float(),
                    self.budget.stage2,
                )
            )
        return found

    def finish(
        self, hidden: Tensor, rotary: tuple[Tensor, ...], index: Tensor, ids: Tensor, answer: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Layers after k on the tokens `index` (B, M): whether each answer is right (B,) bool, and its loss (B,)."""
        hidden = self.run(take(hidden, index), tuple(take(x, index) for x in rotary), self.k, len(self.text.layers))
        row, at = answer.nonzero(as_tuple=True)
        offset = index.shape[1] - ids.shape[1] - 1  # what comes before predicts
        logits = self.model.lm_head(self.text.norm(hidden[row, at + offset])).float().log_softmax(-1)
        target = ids[row, at]
        miss = (logits.argmax(-1) != target).float()
        loss = -logits.gather(1, target[:, None])[:, 0]
        empty = torch.zeros(len(ids))
        return empty.index_add(0, row, miss) == 0, empty.index_add(0, row, loss)


# ---------------------------------------------------------------------- the run


def usual(bench: Bench) -> Tensor:
    """(2, 576), mean and standard deviation of `text` at each patch in other scenes, drawn to their overall ones."""
    pictures, asked = watched(SCENES)
    asked = [replace(x, picture=x.picture - ELSEWHERE) for x in asked if x.picture >= ELSEWHERE]
    sums = torch.zeros(3, PATCHES)
    for _, seen, _, places, *_ in batches(bench, pictures[ELSEWHERE:], asked):
        own = seen[-1].text
        for number, x in enumerate((torch.ones_like(own), own, own**2)):
            sums[number].index_add_(0, places.flatten(), x.flatten())
    whole = sums.sum(1)
    n, first, second = sums + 5 * (whole / whole[0])[:, None]
    return torch.stack([first / n, (second / n - (first / n) ** 2).sqrt()])


def batches(bench: Bench, pictures: list[Image.Image], asked: list[Asked]) -> Iterator[tuple]:
    """Questions, layers, stage 1's choice (B, R1), its raster order, and what `Bench.finish` needs, batch by batch."""
    for first in range(0, len(pictures), PICTURES):
        some = [x for x in asked if first <= x.picture < first + PICTURES]
        rows = torch.tensor([x.picture - first for x in some])
        visual, chosen = bench.encode(pictures[first : first + PICTURES])
        head, masks = bench.tokens(some)
        places, order = chosen[rows].sort(1)
        hidden, rotary = bench.start(visual[rows], places, head, masks["ids"])
        yield some, bench.seen(len(head), places.shape[1], masks), order, places, len(head), hidden, rotary, masks


@torch.inference_mode()
def measure(bench: Bench, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """(3, questions) for each candidate: right, loss, share of the patches asked about that is left (or NaN)."""
    source, count = SETS[args.set]
    pictures, asked = source(args.pictures or count)
    names = args.only or [*CANDIDATES, *BOUNDS]
    by_place = usual(bench) if set(names) & set(BOUNDS) else None
    found: dict[str, list[np.ndarray]] = {}
    for number, (some, seen, order, places, start, hidden, rotary, masks) in enumerate(batches(bench, pictures, asked)):
        rows = torch.tensor([x.picture for x in some])
        wanted = torch.stack([torch.isin(row, torch.tensor(x.relevant)) for row, x in zip(places, some, strict=True)])
        size = torch.tensor([len(x.relevant) for x in some])
        scores = {name: CANDIDATES[name](seen) for name in names if name in CANDIDATES}
        if by_place is not None:
            known = bounds(seen, rows, wanted, order, by_place[:, places], args.seed + number)
            scores |= {name: x for name, x in known.items() if name in names}
        ends = [torch.arange(start), torch.arange(start + places.shape[1], hidden.shape[1])]
        for name, x in scores.items():
            best = top_indices(x, bench.budget.stage2).sort(1).values
            before, after = (end.expand(len(some), -1) for end in ends)
            index = torch.cat([before, best + start, after], 1)
            right, loss = bench.finish(hidden, rotary, index, masks["ids"], masks["answer"])
            share = wanted.gather(1, best).sum(1) / size
            found.setdefault(name, []).append(np.stack([right.numpy(), loss.numpy(), share.numpy()]))
        print(f"{(number + 1) * PICTURES} pictures in {time.process_time():.0f} s", flush=True)
    return {name: np.concatenate(parts, 1) for name, parts in found.items()}


SETTING = ("model", "set", "scorer", "tokens", "layer", "stage1", "stage2", "dtype", "candidate", "n")
MEASURED = ("accuracy", "gain", "low", "high", "loss", "less_loss", "less_low", "less_high", "asked_about")
COLUMNS = (*SETTING, *MEASURED, "seed", "date", "command")


def row(found: dict[str, np.ndarray], name: str) -> dict[str, str]:
    """The measured columns of a candidate."""
    (right, loss, share), (right0, loss0, _) = found[name], found["text"]
    values = right.mean(), *difference(right, right0), loss.mean(), *difference(loss0, loss), np.nanmean(share)
    return {column: f"{x:.4f}" for column, x in zip(MEASURED, values, strict=True)}


def record(path: Path, rows: list[dict[str, str]]) -> None:
    """Put rows in the CSV in place of earlier ones of the same setting."""
    new = {tuple(x[c] for c in SETTING) for x in rows}
    old = []
    if path.exists():
        with path.open(newline="") as file:
            old = [x for x in csv.DictReader(file) if tuple(x[c] for c in SETTING) not in new]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *rows])


def main() -> None:
    """Measure, print, and add rows to the CSV in place of earlier ones of the same setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--set", choices=SETS, default="watched")
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--scorer", choices=["covering", "learned", "diversity"], default="covering")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--layer", type=int, help="k; the library's default without it")
    parser.add_argument("--only", nargs="+", choices=[*CANDIDATES, *BOUNDS], help="candidates; text is always one")
    parser.add_argument("--seed", type=int, default=0, help="of the random draw")
    parser.add_argument("--dtype", type=partial(getattr, torch), default="float32", help="or bfloat16")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.only:
        args.only = ["text", *args.only]
    bench = Bench(args)
    found = measure(bench, args)
    where = (args.model.name, args.set, args.scorer, args.tokens, bench.k, *bench.budget, str(args.dtype)[6:])
    rest = {
        "seed": str(args.seed),
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "examples/testbed/text_scores.py", *sys.argv[1:]]),
    }
    rows = []
    for name, measured in found.items():
        setting = zip(SETTING, map(str, (*where, name, measured.shape[1])), strict=True)
        rows.append({**dict(setting), **row(found, name), **rest})
    for x in sorted(rows, key=lambda x: float(x["loss"])):
        print(f"{x['candidate']:24}", *(f"{x[c]:>8}" for c in MEASURED))
    record(args.output, rows)


if __name__ == "__main__":
    main()
