"""What the evaluation's rows say: intervals, the tables of the pages and the plot, from the CSV alone.

A row of the CSV is one cell on one split. Its ``answers`` hold one bit a question, as a hexadecimal number: the first
question of the split in ``questions.json`` is the highest of ``n`` bits. They make paired comparisons possible, since
all cells answer the same questions: ``difference(a, b, split)`` for any two cells.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np

from lp_patch.budget import default_layer
from lp_patch.colours import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EXAMPLES = Path(__file__).resolve().parent
TESTBED = EXAMPLES / "testbed"
RESULTS = EXAMPLES / "results" / "evaluation_testbed.csv"
SPLITS = ("seen_styles", "unseen_style")
TYPES = ("existence", "existence yes", "existence no", "count", "what", "where", "colour")
BUDGETS = (192, 128, 64, 32, 16, 8)
BLIND = ("grey picture", "wrong picture")
ORACLE = "oracle"
NO_STAGE_1 = "none"  # the library's name for it
ALONE = {"stage_ratio": 1.0, "layer": None, "text_scorer": None}
LAYERS = 6  # of the testbed model
ORDER = (
    "random",
    "uniform",
    "cls",
    "diversity",
    "vispruner",
    "visionzip",
    "hiprune",
    "oc-vtp",
    "metacompress",
    "covering",
    "learned",
)
NEIGHBOURS = ("oc-vtp", "metacompress")
DIVERSITIES = (0.0, 0.1, 0.2, 0.5, 1.0)
TENTH = 0.1  # the library's default share of diversity
DRAWS = 10_000
SPENT = "*true average*"
LEGEND = textwrap.fill(
    "Cells: accuracy in % / share of the accuracy with all tokens in % (its 95 % interval: bootstrap over the "
    "questions, which all methods share, 10,000 draws; the weights stay as they are) [lowest to highest accuracy of "
    "the seeds of training; the numbers before are of the mean over these seeds]. A cell without an interval is from "
    "before single answers were kept; a dash was not measured. A table's first line is the true average of tokens, "
    "which the paper's rounding lets exceed the budget: two columns compare fairly only if theirs is the same.",
    120,
)


def text_mode(layers: int) -> dict:
    """Both stages as the library's defaults have them on so many decoder layers."""
    return {"stage_ratio": 3.0, "layer": default_layer(layers), "text_scorer": "text"}


TEXT = text_mode(LAYERS)


def depths(layers: int) -> range:
    """The layers of a sweep: about six, the default among them."""
    step = max(1, layers // 6)
    return range(default_layer(layers) % step or step, layers, step)


@dataclass(frozen=True)
class Cell:
    """One way of answering.

    Attributes:
        scorer: of the library's catalogue; or "full", a blind input, or "none" (no stage 1).
        pruner: label of the trained weights, for scorers that read them.
        stage_ratio: 1 is stage 1 alone; None without a stage 1.
        diversity: None where the scorer has no use for it.
    """

    scorer: str
    pruner: str | None = None
    tokens: int = 576
    stage_ratio: float | None = 1.0
    layer: int | None = None
    text_scorer: str | None = None
    diversity: float | None = None
    seed: int = 0

    @classmethod
    def of(cls, row: dict[str, str]) -> Cell:
        """The cell of a row."""
        kinds = {"tokens": int, "stage_ratio": float, "layer": int, "diversity": float, "seed": int}
        return cls(**{x.name: kinds.get(x.name, str)(row[x.name]) if row[x.name] else None for x in fields(cls)})

    @property
    def method(self) -> str:
        """What a table calls it."""
        if self.scorer == NO_STAGE_1:
            return f"{self.text_scorer}, no stage 1"
        if self.scorer == "learned":
            return self.pruner or self.scorer
        if self.scorer == "cls" and self.diversity:
            return f"cls, {self.diversity:.0%} diverse"
        return f"{self.scorer}, {self.pruner}" if self.pruner not in (None, "learned") else self.scorer

    @property
    def family(self) -> Cell:
        """The cell without the seeds of training and of drawing; "seed0" is "learned", "x-seed0" is "x"."""
        found = re.fullmatch(r"(?:(.+)[-_])?seed\d+", self.pruner or "")
        return replace(self, pruner=(found[1] or "learned") if found else self.pruner, seed=0)


COLUMNS = (
    "split",
    *(x.name for x in fields(Cell)),
    "pruner_sha256",
    "average",
    "n",
    "correct",
    "accuracy",
    "low",
    "high",
    "relative",
    "relative_low",
    "relative_high",
    *TYPES,
    "foreground_recall",
    "relevant_recall",
    "answers",
    "model_sha256",
    "dtype",
    "device",
    "torch",
    "transformers",
    "lp_patch",
    "date",
    "command",
)


def spread_cls() -> Cell:
    """[CLS] attention with the library's default share of diversity: the strongest of what needs no training."""
    return replace(base("cls"), diversity=TENTH)


def base(scorer: str, pruner: str | None = None) -> Cell:
    """A method's cell without a budget: the learned one with the paper's share of diversity, the others plain."""
    return Cell(scorer, pruner, diversity={"learned": TENTH, "diversity": None, "full": None}.get(scorer, 0.0))


# ---------------------------------------------------------------------- rows


def load(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def save(path: Path, rows: list[dict[str, str]]) -> None:
    """Write all rows in order; a file half written never takes the place of a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    with scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["split"], place(Cell.of(row)))))
    os.replace(scratch, path)


def complete(rows: list[dict[str, str]]) -> None:
    """Fill in accuracies relative to the full model's."""
    full = {row["split"]: row for row in rows if row["scorer"] == "full" and row["answers"]}
    for row in rows:
        whole = full.get(row["split"])
        if whole and row["answers"] and row["n"] == whole["n"]:
            row["relative"], row["relative_low"], row["relative_high"] = (
                f"{x:.4f}" for x in relative(bits(row), bits(whole))
            )


def place(cell: Cell) -> tuple:
    """Where a cell stands in the file and in the tables."""
    names = ("full", *BLIND, *ORDER, NO_STAGE_1, ORACLE)
    first = names.index(cell.scorer) if cell.scorer in names else len(ORDER) + 2.5
    known = [-1 if x is None else x for x in (cell.stage_ratio, cell.layer, cell.diversity)]
    label = (cell.family.pruner or "") != "learned", cell.pruner or ""
    return first, cell.scorer, label, cell.text_scorer or "", *known, -cell.tokens, cell.seed


def to_hex(correct: list[bool]) -> str:
    """Bits as a hexadecimal number, the first bit highest."""
    return f"{int(''.join(str(int(x)) for x in correct), 2):0{(len(correct) + 3) // 4}x}"


def digest(path: Path) -> str:
    """The start of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def bits(row: dict[str, str]) -> np.ndarray:
    """(n,) float32: 1 where the row's answer is right."""
    n = int(row["n"])
    return np.array(list(f"{int(row['answers'], 16):0{n}b}"), dtype=np.float32)


@cache
def questions(part: str = "questions") -> list[dict] | dict:
    """All questions, in the order of the answers; or the object patches by picture ("foreground")."""
    return json.loads((TESTBED / "evaluation" / "questions.json").read_text())[part]


def kinds(question: dict) -> set[str]:
    """The types that a question counts for."""
    return {question["type"], f"{question['type']} {question['answer']}"} & set(TYPES)


@cache
def asked(split: str) -> Counter[str]:
    """How many questions of a split count for each type, and in all ("accuracy")."""
    return Counter(kind for x in questions() if x["split"] == split for kind in ("accuracy", *kinds(x)))


# ---------------------------------------------------------------------- intervals


def wilson(correct: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    z = 1.959964
    share = correct / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


@cache
def _draws(n: int) -> np.ndarray:
    """(DRAWS, n): how often each draw of the bootstrap, n questions with replacement, holds each question."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS).astype(np.float32)


def relative(correct: np.ndarray, full: np.ndarray) -> tuple[float, float, float]:
    """Accuracy over the full model's, with a 95 % bootstrap interval: both answer the same questions (n,)."""
    draws = _draws(len(full))
    return correct.sum() / full.sum(), *np.percentile((draws @ correct) / (draws @ full), (2.5, 97.5))


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Accuracy of a minus that of b on the same questions (n,), with its 95 % bootstrap interval."""
    gap = a - b
    return gap.mean(), *np.percentile(_draws(len(gap)) @ gap / len(gap), (2.5, 97.5))


# ---------------------------------------------------------------------- tables


class Results:
    """The rows of a CSV, found by cell; those of several seeds together. `layers`: the model's."""

    def __init__(self, rows: list[dict[str, str]], layers: int = LAYERS) -> None:
        self.layers = layers
        self.both = text_mode(layers)
        self.modes = ((ALONE, "stage 1 alone"), (self.both, "stage 1 + text"))
        self.rows: dict[tuple[str, Cell], list[dict[str, str]]] = {}
        for row in rows:
            self.rows.setdefault((row["split"], Cell.of(row).family), []).append(row)
        cells = sorted({cell for _, cell in self.rows}, key=place)
        # methods that have a budget and a stage 1, without the budget
        plain = [x for x in cells if x.scorer not in ("full", NO_STAGE_1, ORACLE, *BLIND)]
        starts = [y for x in plain for y in (base(x.scorer, x.pruner), *([spread_cls()] if x.scorer == "cls" else []))]
        self.methods = [x for x in dict.fromkeys(starts) if x.pruner in (None, "learned")]
        self.variants = [x for x in dict.fromkeys(starts) if x.pruner not in (None, "learned")]
        beside = [x.text_scorer for x in cells if x.text_scorer and x.scorer != NO_STAGE_1]
        self.text_scorers = list(dict.fromkeys(beside))
        self.in_llm = list(dict.fromkeys(replace(x, tokens=576) for x in cells if x.scorer == NO_STAGE_1))

    def mean(self, split: str, cell: Cell, column: str = "accuracy") -> float | None:
        """A column's mean over the seeds, None where nothing was measured."""
        values = [float(row[column]) for row in self.rows.get((split, cell), []) if row[column]]
        return sum(values) / len(values) if values else None

    def answers(self, split: str, cell: Cell) -> np.ndarray | None:
        """(n,) mean over the seeds of right and wrong; None where answers were not kept."""
        found = [bits(row) for row in self.rows.get((split, cell), []) if row["answers"]]
        return np.mean(found, axis=0) if found else None

    def retained(self, split: str, cell: Cell) -> tuple[float, float, float] | None:
        """Relative accuracy of the mean over the seeds, with the interval of sampling questions."""
        rows = self.rows.get((split, cell), [])
        if len(rows) == 1:
            values = [rows[0][x] for x in ("relative", "relative_low", "relative_high")]
            return tuple(map(float, values)) if all(values) else None
        correct, full = self.answers(split, cell), self.answers(split, Cell("full"))
        return None if correct is None or full is None else relative(correct, full)

    def text(self, split: str, cell: Cell) -> str:
        """Accuracy, share of the full model's accuracy (interval) [lowest to highest seed], in %."""
        share, full = self.mean(split, cell), self.mean(split, Cell("full"))
        if share is None or full is None:
            return "-"
        text, interval = f"{100 * share:.1f} / {100 * share / full:.1f}", self.retained(split, cell)
        if interval:
            text += f" ({100 * interval[1]:.1f}–{100 * interval[2]:.1f})"
        seeds = [float(row["accuracy"]) for row in self.rows[split, cell]]
        return text if len(seeds) == 1 else f"{text} [{100 * min(seeds):.1f}–{100 * max(seeds):.1f}]"

    def spent(self, split: str, cells: Iterable[Cell]) -> str:
        """The true average of tokens of these cells, from least to most where they differ."""
        means = [self.mean(split, x, "average") for x in cells]
        found = sorted({f"{x:.1f}" for x in means if x is not None}, key=float)
        return "–".join(dict.fromkeys([*found[:1], *found[-1:]])) or "-"

    def by_type(self, split: str, cell: Cell, kind: str) -> str:
        """Accuracy on one type of question ("accuracy": all) with its Wilson interval, in %."""
        share, n = self.mean(split, cell, kind), asked(split)[kind]
        if share is None:
            return "-"
        low, high = wilson(share * n, n)
        return f"{100 * share:.1f} ({100 * low:.0f}–{100 * high:.0f})"

    def shares(self, split: str, cell: Cell) -> str:
        """Object patches left by stage 1 / patches asked about left in the end, in %."""
        values = [self.mean(split, cell, x) for x in ("foreground_recall", "relevant_recall")]
        return " / ".join(f"{100 * x:.0f}" for x in values if x is not None) or "-"


def grid(corner: str, columns: Iterable, lines: Iterable[tuple[str, list[str]]]) -> list[str]:
    """A Markdown table with a blank line after it; lines of dashes alone are left out, and so is an empty table."""
    lines = [(name, cells) for name, cells in lines if set(cells) != {"-"}]
    columns = list(map(str, columns))
    head = [f"| {corner} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    return [*head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in lines), ""] if lines else []


def testbed_tables(results: Results) -> str:
    """What was measured, for the testbed's README; sweeps and types on the seen styles alone."""
    lines = [line for split in SPLITS for line in _split_tables(results, split)]
    seen = SPLITS[0]
    for mode, title in results.modes:
        cells = [replace(x, tokens=t, **mode) for t in (64, 32) for x in results.methods]
        found = [
            (f"{x.method}, {results.spent(seen, [x])}", [results.by_type(seen, x, kind) for kind in TYPES])
            for x in cells
        ]
        lines += headed("By question type, seen styles, " + title, grid("method, true average", TYPES, found))
    lines += headed("Differences between two methods on the same questions, seen styles", _differences(results, seen))
    return "\n".join([*lines, *_sweeps(results, seen)]).rstrip()


def _sweeps(results: Results, seen: str) -> list[str]:
    """One option after the other, at 64 and 32 tokens; ways of training."""
    lines: list[str] = []
    sweeps = {
        "Decoder layers before the cut (k), both stages": [(str(k), {"layer": k}) for k in depths(results.layers)],
        "R1 : R2": [("1", ALONE), *((str(r), {"stage_ratio": float(r)}) for r in (1.5, 2, 3, 4))],
        "Share of diversity in stage 1, stage 1 alone": [(str(x), {**ALONE, "diversity": x}) for x in DIVERSITIES],
        "Share of diversity in stage 1, both stages": [(str(x), {"diversity": x}) for x in DIVERSITIES],
        "Who asks in stage 2": [(x, {"text_scorer": x}) for x in results.text_scorers],
    }
    for title, settings in sweeps.items():
        found = []
        for t in (64, 32):
            rows = []
            for x in results.methods:
                if x == spread_cls():
                    continue  # a column of cls
                cells = [replace(x, **{**results.both, **y, "tokens": t}) for _, y in settings]
                texts = [results.text(seen, cell) for cell in cells]
                # a method that was not swept has a cell or two all the same
                if "-" not in texts and len(texts) > 1:
                    rows.append((cells, (f"{x.method}, {t}", texts)))
            if rows:
                columns = zip(*(cells for cells, _ in rows), strict=True)
                found.append((f"{SPENT}, {t}", [results.spent(seen, column) for column in columns]))
            found += [line for _, line in rows]
        lines += headed(f"{title}, seen styles", grid("method, tokens", [name for name, _ in settings], found))
    variants = [base("learned", "learned"), *results.variants] if results.variants else []
    for mode, title in results.modes:
        rows = [(x.method, [replace(x, tokens=t, **mode) for t in (64, 32, 16)]) for x in variants]
        found = _with_spent(results, seen, rows, results.text)
        lines += headed(f"Ways of training, seen styles, {title}", grid("pruner", (64, 32, 16), found))
    return lines


def _split_tables(results: Results, split: str) -> list[str]:
    """One split: blind floors, accuracy and recall by method and budget."""
    name = split.replace("_", " ")
    inputs = [Cell(x) for x in ("full", *BLIND) if results.mean(split, Cell(x)) is not None]
    found = [(x.scorer, [results.by_type(split, x, kind) for kind in ("accuracy", *TYPES)]) for x in inputs]
    counts = asked(split)
    heads = [f"all, n = {counts['accuracy']}", *(f"{kind}, {counts[kind]}" for kind in TYPES)]
    lines = headed(f"All 576 tokens{' against no picture' * (len(inputs) > 1)}, {name}", grid("input", heads, found))
    recalls = "Object patches that stage 1 keeps / patches asked about that are left in the end, %,"
    for column, title in (("text", "Accuracy"), ("shares", recalls)):
        tables = []
        for mode, stages in results.modes:
            last = [base(ORACLE)] if mode is ALONE else results.in_llm
            cells = [(x.method, [replace(x, tokens=t, **mode) for t in BUDGETS]) for x in results.methods]
            cells += [(x.method, [replace(x, tokens=t) for t in BUDGETS]) for x in last]
            show = getattr(results, column)
            tables += grid(stages, BUDGETS, _with_spent(results, split, cells, show))
        lines += headed(f"{title} by method and average number of tokens, {name}", tables)
    return lines


def _with_spent(
    results: Results, split: str, rows: list[tuple[str, list[Cell]]], show: Callable[[str, Cell], str]
) -> list[tuple[str, list[str]]]:
    """Lines of a table whose cells these are, below one with what each column truly spends."""
    columns = list(zip(*(cells for _, cells in rows), strict=True))
    lines = [(name, [show(split, cell) for cell in cells]) for name, cells in rows]
    if all(set(cells) == {"-"} for _, cells in lines):
        return []
    return [(SPENT, [results.spent(split, cells) for cells in columns]), *lines]


def _differences(results: Results, split: str) -> list[str]:
    """Accuracy of one method minus another's, in points, with its interval."""
    cls, free, learned = base("cls"), base("diversity"), base("learned", "learned")
    covering, spread, both = base("covering", "learned"), spread_cls(), results.both
    pairs = {
        "learned - cls, stage 1 alone": (learned, cls, ALONE, ALONE),
        "learned - diversity, stage 1 alone": (learned, free, ALONE, ALONE),
        "learned: text - stage 1 alone": (learned, learned, both, ALONE),
        "learned - cls, stage 1 + text": (learned, cls, both, both),
        f"learned - {spread.method}, stage 1 + text": (learned, spread, both, both),
        "learned - diversity, stage 1 + text": (learned, free, both, both),
        "covering - diversity, stage 1 alone": (covering, free, ALONE, ALONE),
        "covering - diversity, stage 1 + text": (covering, free, both, both),
        "covering - uniform, stage 1 + text": (covering, base("uniform"), both, both),
        "covering: text - stage 1 alone": (covering, covering, both, ALONE),
        f"covering - {spread.method}, stage 1 + text": (covering, spread, both, both),
        "covering - learned, stage 1 + text": (covering, learned, both, both),
        "diversity: text - stage 1 alone": (free, free, both, ALONE),
    }
    lines = []
    for name, (x, y, of_x, of_y) in pairs.items():
        cells = []
        for tokens in BUDGETS:
            a, b = (results.answers(split, replace(z, tokens=tokens, **of)) for z, of in ((x, of_x), (y, of_y)))
            values = None if a is None or b is None else [100 * value for value in difference(a, b)]
            more = _spends_more(results, split, *(replace(z, tokens=tokens, **of) for z, of in ((x, of_x), (y, of_y))))
            cells.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*values) + more if values else "-")
        lines.append((name, cells))
    return grid("points", BUDGETS, lines)


def _spends_more(results: Results, split: str, one: Cell, other: Cell) -> str:
    """How many more tokens one cell truly spends than the other, if that is a tenth or more."""
    a, b = (results.mean(split, x, "average") for x in (one, other))
    more = 0.0 if a is None or b is None else a - b
    return f", with {more:+.1f} tokens" if abs(more) >= 0.1 else ""


def headed(title: str, table: list[str]) -> list[str]:
    """A table under its heading; nothing for an empty one."""
    return [f"### {title}", "", *table] if table else []


def readme_table(results: Results) -> str:
    """The small table of docs/accuracy.md."""
    return "\n".join(
        [
            full_line(results),
            "",
            LEGEND,
            "",
            *short_table(results),
            "Budgets, question types, a style never seen, sweeps: the testbed's README; "
            "every cell, with the command that",
            "made it: `examples/results/evaluation_testbed.csv`.",
        ]
    )


def full_line(results: Results) -> str:
    """What all tokens reach."""
    (full, *_) = results.rows[SPLITS[0], Cell("full")]
    low, high = (100 * float(full[x]) for x in ("low", "high"))
    return (
        f"{full['n']} questions in the styles of training; all 576 tokens: {100 * float(full['accuracy']):.1f} % "
        f"(95 % interval {low:.1f} to {high:.1f})."
    )


def short_table(results: Results) -> list[str]:
    """Accuracy of every method at two small budgets, alone and with text."""
    columns = [(t, mode, title) for t in (32, 16) for mode, title in results.modes]
    rows = [(x.method, [replace(x, tokens=t, **mode) for t, mode, _ in columns]) for x in results.methods]
    found = _with_spent(results, SPLITS[0], rows, results.text)
    return grid("budget", [f"{t}, {title}" for t, _, title in columns], found)


def short(results: Results) -> str:
    """What all tokens reach, and the small table."""
    return "\n".join([full_line(results), "", *short_table(results)]).rstrip()


def large_tables(results: Results) -> str:
    """What was measured on the larger language model, for the testbed's README."""
    lines = [*_split_tables(results, SPLITS[0])]
    lines += headed("Differences between two methods on the same questions", _differences(results, SPLITS[0]))
    return "\n".join([*lines, *_sweeps(results, SPLITS[0])]).rstrip()


def neighbour_tables(results: Results) -> str:
    """OC-VTP and MetaCompress, and what they are better and worse than, for docs/neighbours.md."""
    split, budgets = SPLITS[0], (64, 32, 16)
    columns = [(t, mode, title) for t in budgets for mode, title in results.modes]
    own = [base(name, "learned") for name in NEIGHBOURS]
    others = [base("diversity"), spread_cls(), base("learned", "learned"), base("covering", "learned")]
    rows = [(x.method, [replace(x, tokens=t, **m) for t, m, _ in columns]) for x in own + others]
    found = _with_spent(results, split, rows, results.text)
    heads = [f"{t}, {title}" for t, _, title in columns]
    lines = [full_line(results), "", LEGEND, "", *grid("budget", heads, found)]
    pairs = [(x, y) for x in own for y in others] + [(own[1], own[0])]
    gaps = []
    for x, y in pairs:
        cells = []
        for t, mode, _ in columns:
            a, b = (results.answers(split, replace(z, tokens=t, **mode)) for z in (x, y))
            values = None if a is None or b is None else [100 * value for value in difference(a, b)]
            cells.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*values) if values else "-")
        gaps.append((f"{x.method} - {y.method}", cells))
    text = "Differences in points on the same questions, with their 95 % intervals:"
    return "\n".join([*lines, text, "", *grid("points", heads, gaps)]).rstrip()


# ---------------------------------------------------------------------- plot

# shapes tell the two of a colour apart
# visionzip is cls without a share of diversity, which the plain cls has not either: one line for both
LINES = {
    "covering": ("covering", VERMILION, "D"),
    "learned": ("learned", BLUE, "o"),
    "oc-vtp": ("oc-vtp", BLUE, "<"),
    "metacompress": ("metacompress", VERMILION, ">"),
    "cls, 10% diverse": ("cls, 10% diverse", GREEN, "s"),
    "diversity": ("diversity", ORANGE, "^"),
    "vispruner": ("vispruner", PURPLE, "v"),
    "cls": ("cls, visionzip", GREEN, "x"),
    "hiprune": ("hiprune", SKY, "P"),
    "uniform": ("uniform", "0.45", "+"),
    "random": ("random", "0.7", "."),
}
STRONG = ("covering", "learned")  # the methods with training


def plot(results: Results, path: Path) -> None:
    """Relative accuracy against the true average of tokens, seen styles, with 95 % intervals."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 5.5), sharey=True, layout="constrained")
    by_name = {x.method: x for x in results.methods}
    lowest, most = 100.0, 0.0
    for panel, (mode, title) in zip(panels, results.modes, strict=True):
        for number, name in enumerate(x for x in LINES if x in by_name):
            cells = [replace(by_name[name], tokens=t, **mode) for t in BUDGETS]
            found = [(x, results.mean(SPLITS[0], x)) for x in cells]
            # a row from before answers were kept is a point without a bar
            whole = results.mean(SPLITS[0], Cell("full"))
            found = [
                (results.mean(SPLITS[0], x, "average"), results.retained(SPLITS[0], x) or (share / whole,) * 3)
                for x, share in found
                if share
            ]
            if not found:
                continue
            # a little to the side, so that the bars of different methods do not hide each other
            x = np.array([tokens for tokens, _ in found]) * 1.012 ** (number - 4)
            y, low, high = 100 * np.array([y for _, y in found]).T
            lowest, most = min(lowest, low.min()), max(most, x.max())
            label, color, marker = LINES[name]
            strong = name in STRONG
            style = {"linewidth": 3 if strong else 1.3, "elinewidth": 1, "markersize": 7 if strong else 5}
            bars = np.maximum((y - low, high - y), 0)
            panel.errorbar(x, y, bars, marker=marker, color=color, label=label, zorder=3 if strong else 2, **style)
        panel.axhline(100, color="0.3", linewidth=0.8, linestyle=":")
        panel.set(title=title, xscale="log", xlabel="visual tokens, of 576: the true average over the layers")
        held = [tokens for tokens in BUDGETS if tokens <= most * 1.05]
        panel.set_xticks(held, held)
        panel.minorticks_off()
        panel.grid(alpha=0.25)
    panels[0].set(ylabel="% of the accuracy with all tokens", ylim=(lowest - 2, 104))
    handles, labels = max((panel.get_legend_handles_labels() for panel in panels), key=lambda x: len(x[1]))
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(labels) // 2))
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------- where it goes


@dataclass(frozen=True)
class Study:
    """One model's CSV: its decoder layers, and between which marks of a page which tables of it stand."""

    path: Path
    layers: int
    tables: dict[str, Callable[[Results], str]]

    def results(self) -> Results:
        """What the CSV says."""
        return Results(load(self.path), self.layers)


STUDIES = {
    "model": Study(
        RESULTS,
        LAYERS,
        {
            "tables": lambda results: f"{LEGEND}\n\n{testbed_tables(results)}",
            "retention": readme_table,
            "neighbours": neighbour_tables,
        },
    ),
    "healed": Study(RESULTS.with_name("evaluation_healed.csv"), LAYERS, {"healed": short}),
    "smollm": Study(RESULTS.with_name("evaluation_smollm.csv"), 30, {"smollm tables": large_tables, "smollm": short}),
    "smollm healed": Study(RESULTS.with_name("evaluation_smollm_healed.csv"), 30, {"smollm healed": short}),
}
PAGES = (TESTBED / "README.md", *(EXAMPLES.parent / "docs" / name for name in ("accuracy.md", "neighbours.md")))


def between(text: str, name: str, make: Callable[[], str]) -> str:
    """A page with what stands between the marks of this name made anew; as it is where they are not."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text:
        return text
    before, rest = text.split(begin)
    return f"{before}{begin}\n{make()}\n{end}{rest.split(end)[1]}"


def filled(text: str) -> str:
    """A page with the tables of all studies made anew."""
    for study in STUDIES.values():
        for name, make in study.tables.items():
            text = between(text, name, lambda make=make, study=study: make(study.results()))
    return text


def publish(path: Path, layers: int) -> None:
    """The plot beside the CSV; tables into their pages, or to the terminal if it is not a committed CSV."""
    rows = load(path)
    complete(rows)
    save(path, rows)
    results = Results(rows, layers)
    plot(results, path.with_suffix(".png"))
    if path.resolve() not in [study.path for study in STUDIES.values()]:
        print(testbed_tables(results))
        return
    for page in PAGES:
        page.write_text(filled(page.read_text()))
