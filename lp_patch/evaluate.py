"""What pruning costs on somebody's own prompts: accuracy, or agreement with the full model, with paired intervals."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from . import colours
from .answers import Answer, bare, check_prompts, greedy, installed, prepare, true_averages, visual_tokens
from .config import PruningConfig
from .errors import ConfigError
from .handle import Patch
from .show import need

FULL = "full"
DRAWS = 9999
MARKS = "osD^vP*X"

Setting = PruningConfig | Mapping[str, Any]


class Interval(NamedTuple):
    """A mean, and the ends of its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcome:
    """What one setting reached.

    Attributes:
        name: how tables call it.
        settings: the options as they were given, without the budgets' defaults; empty for the full model.
        scores: (n,) of each prompt, in [0, 1] unless the caller's `score` says otherwise.
        averages: (n,) visual tokens of each prompt, averaged over the decoder layers, as they ran.
    """

    name: str
    settings: dict[str, Any]
    scores: np.ndarray
    averages: np.ndarray


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Settings compared on the same prompts; print it, or read its fields.

    Attributes:
        measure: "accuracy" (against labels) or "agreement" (with the full model's own answers).
        outcomes: the full model's first.
        confidence: of all intervals.
    """

    measure: str
    outcomes: tuple[Outcome, ...]
    confidence: float

    def __getitem__(self, name: str) -> Outcome:
        for outcome in self.outcomes:
            if outcome.name == name:
                return outcome
        raise ConfigError(f"no setting is called {name!r}: there are {[x.name for x in self.outcomes]}")

    def score(self, name: str) -> Interval:
        """A setting's mean score, with the interval of drawing other prompts."""
        return _interval(self[name].scores, self.confidence)

    def difference(self, name: str, other: str = FULL) -> Interval:
        """Mean score of one setting minus another's on the same prompts (paired), with its interval."""
        return _interval(self[name].scores - self[other].scores, self.confidence)

    def to_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and dicts, for JSON."""
        return {"measure": self.measure, "confidence": self.confidence, "settings": list(self._rows())}

    def save(self, path: str | Path, **columns: object) -> None:
        """Write a CSV, a row for each setting, with more columns alike for all; `scores` are in the prompts' order."""
        rows = list(self._rows())
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["measure", *rows[0], *columns], lineterminator="\n")
            writer.writeheader()
            for row in rows:
                scores = " ".join(f"{x:g}" for x in row["scores"])
                shown = {**row, "settings": json.dumps(row["settings"]), "scores": scores}
                writer.writerow({"measure": self.measure, **shown, **columns})

    def plot(self, path: str | Path) -> None:
        """Draw scores against the true average of visual tokens; settings that differ in budget alone make a line."""
        need("matplotlib", "evaluate")
        from matplotlib.figure import Figure

        lines: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes[1:]:
            rest = {name: x for name, x in outcome.settings.items() if name not in ("tokens", "ratio")}
            lines.setdefault(describe(rest) or "default", []).append(outcome)
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for number, (label, found) in enumerate(lines.items()):
            found.sort(key=lambda outcome: outcome.averages.mean())
            intervals = np.array([self.score(outcome.name) for outcome in found])
            mean, low, high = intervals.T
            axes.errorbar(
                [outcome.averages.mean() for outcome in found],
                mean,
                np.maximum((mean - low, high - mean), 0),
                marker=MARKS[number // len(colours.ALL) % len(MARKS)],
                color=colours.ALL[number % len(colours.ALL)],
                linewidth=2,
                elinewidth=1,
                label=label,
            )
        axes.axhline(self.outcomes[0].scores.mean(), color="0.3", linestyle=":", label="full model")
        axes.set(xlabel="visual tokens, the true average over the decoder layers", ylabel=self.measure, xscale="log")
        ticks = sorted({round(float(outcome.averages.mean()), 1) for outcome in self.outcomes[1:]})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend()
        figure.savefig(Path(path), dpi=110)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for x in self.outcomes:
            mean, low, high = self.score(x.name)
            gap, gap_low, gap_high = self.difference(x.name)
            yield {
                "name": x.name,
                "n": len(x.scores),
                "average": float(x.averages.mean()),
                "score": mean,
                "low": low,
                "high": high,
                "difference": gap,
                "difference_low": gap_low,
                "difference_high": gap_high,
                "settings": x.settings,
                "scores": x.scores.tolist(),
            }

    def __str__(self) -> str:
        rows = list(self._rows())
        width = max(len("setting"), *(len(row["name"]) for row in rows))
        lines = [
            f"lp_patch: {self.measure} on {rows[0]['n']} prompts, in %; tokens are the true average over the layers; "
            f"{self.confidence:.0%} intervals",
            f"{'setting':<{width}} {'tokens':>7} {'all':>6}  {'interval':<14} less the full model's",
        ]
        for row in rows:
            own, interval, gap = (
                [100 * row[name] for name in names]
                for names in (("score",), ("low", "high"), ("difference", "difference_low", "difference_high"))
            )
            left = f"{row['name']:<{width}} {row['average']:>7.1f} {own[0]:>6.1f}  "
            text = "{:.1f} to {:.1f}".format(*interval)
            less = "" if row["name"] == FULL else "{:+.1f} ({:+.1f} to {:+.1f})".format(*gap)
            lines.append(f"{left}{text:<14} {less}".rstrip())
        return "\n".join(lines)

    def __repr__(self) -> str:
        n = len(self.outcomes[0].scores)
        return f"<lp_patch.Evaluation: {self.measure} of {len(self.outcomes)} settings on {n} prompts>"


def evaluate(
    model: nn.Module,
    prompts: Iterable[Any],
    settings: Mapping[str, Setting] | Sequence[Setting],
    *,
    labels: Iterable[Any] | None = None,
    decode: Callable[[Tensor], str] | None = None,
    score: Callable[[Any, Any], float] | None = None,
    max_new_tokens: int = 32,
    confidence: float = 0.95,
    progress: bool = True,
) -> Evaluation:
    """Compare settings on one's own prompts, each answered greedily by the full and by every pruned model.

    Args:
        model: unpatched, or patched by us: then the patch is back at the end, and takes no part.
        prompts: processor outputs (dicts of tensors, batched or not, padded on the left), read once, one at a time.
        settings: what `apply` takes, as `PruningConfig` or dict, which may hold "pruner"; by name, or in a list, where
            the options are the name.
        labels: the right answers, one a prompt (of a batch: one a row). None: the full model's own answers, of which
            `score` says how far a pruned one agrees.
        decode: (T,) int64, an answer's tokens up to its end token -> a string, such as ``lambda ids:
            tokenizer.decode(ids, skip_special_tokens=True)``; its outer blanks are taken off. Needed with labels.
        score: (answer, label or full model's answer) -> number; both are strings, or tuples of token ids without
            `decode`. None: 1 where they are equal, else 0.
        max_new_tokens: longest answer.
        confidence: of the intervals (scipy's percentile bootstrap over the prompts, 9999 draws). They count prompts as
            independent: of many questions on one picture they are too narrow.
        progress: show it on stderr.

    Raises:
        ConfigError: a setting is wrong, or prompts and labels do not fit.
        ImportError: scipy is missing.
    """
    _scipy()
    if labels is not None and decode is None:
        raise ConfigError("labels need decode=..., which turns an answer's token ids into the text to compare")
    named = _named(settings)
    expected = None if labels is None else list(labels)
    with bare(model):
        patches: dict[str, Patch | None] = {FULL: None}
        for name, setting in named.items():
            options, pruner = _split(setting)
            patches[name] = prepare(model, options, pruner)
        scores: dict[str, list[float]] = {name: [] for name in patches}
        averages: dict[str, list[float]] = {name: [] for name in patches}
        total = len(prompts) if isinstance(prompts, Sized) else None
        for prompt in tqdm(check_prompts(prompts), "lp_patch.evaluate", total, disable=not progress):
            start, references, visual = len(scores[FULL]), [], []
            for name, patch in patches.items():
                with installed(patch):
                    answers = _texts(greedy(model, prompt, max_new_tokens), decode)
                    if patch is not None:
                        averages[name] += true_averages(patch)
                        visual = visual_tokens(patch)
                if name == FULL:
                    references = answers if expected is None else expected[start : start + len(answers)]
                    if len(references) < len(answers):
                        raise ConfigError(f"there are more prompts than the {len(expected or [])} labels")
                pairs = zip(answers, references, strict=True)
                scores[name] += [float(a == b if score is None else score(a, b)) for a, b in pairs]
            averages[FULL] += visual
    n = len(scores[FULL])
    if n < 2 or (expected is not None and len(expected) != n):
        given = "" if expected is None else f" and {len(expected)} labels"
        raise ConfigError(f"got {n} prompts{given}: give 2 or more, and a label for each")
    outcomes = [
        Outcome(name, {} if name == FULL else _shown(named[name]), np.array(scores[name]), np.array(averages[name]))
        for name in patches
    ]
    return Evaluation("agreement" if expected is None else "accuracy", tuple(outcomes), confidence)


def describe(options: Mapping[str, Any]) -> str:
    """Options as one line."""
    return ", ".join(f"{name}={x!r}" for name, x in options.items())


def _texts(answer: Answer, decode: Callable[[Tensor], str] | None) -> list[Any]:
    """Each row's answer as text, or as a tuple of ids."""
    rows = [tokens[valid].cpu() for tokens, valid in zip(*answer, strict=True)]
    return [tuple(row.tolist()) if decode is None else decode(row).strip() for row in rows]


def _named(settings: Mapping[str, Setting] | Sequence[Setting]) -> dict[str, Setting]:
    """The settings by name."""
    if isinstance(settings, PruningConfig):
        raise ConfigError("settings must be a list of settings, or a dict of them by name: put a single one in a list")
    given = list(settings.values() if isinstance(settings, Mapping) else settings)
    wrong = [x for x in given if not isinstance(x, (PruningConfig, Mapping))]
    if wrong or not given or (isinstance(settings, Mapping) and FULL in settings):
        raise ConfigError(
            f'settings must be one or more PruningConfigs or dicts, none called "{FULL}", got {settings!r:.200}'
        )
    names = list(settings) if isinstance(settings, Mapping) else [describe(_shown(x)) or "default" for x in given]
    if len(set(names)) < len(names):
        raise ConfigError(f"two settings are the same: {names}")
    return dict(zip(names, given, strict=True))


def _split(setting: Setting) -> tuple[Setting, Any]:
    """The options, and the pruner or None."""
    if isinstance(setting, PruningConfig):
        return setting, None
    return {name: x for name, x in setting.items() if name != "pruner"}, setting.get("pruner")


def _shown(setting: Setting) -> dict[str, Any]:
    """The options that were given; of a config, those that are not at their default."""
    if isinstance(setting, PruningConfig):
        options = {x.name: getattr(setting, x.name) for x in fields(setting)}
        return {x.name: options[x.name] for x in fields(setting) if options[x.name] not in (x.default, None)}
    plain = (str, int, float, bool, type(None))
    return {name: x if isinstance(x, plain) else str(x)[:80] for name, x in setting.items()}


def _interval(values: np.ndarray, confidence: float) -> Interval:
    """The mean of values (n,) with its bootstrap interval."""
    drawn = _scipy()(
        (values,),
        np.mean,
        n_resamples=DRAWS,
        batch=999,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(values.mean()), float(drawn.low), float(drawn.high))


def _scipy() -> Callable[..., Any]:
    """scipy's bootstrap, which not everybody has installed."""
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise ImportError('intervals are scipy\'s: pip install "lp_patch[evaluate]"') from error
    return bootstrap
