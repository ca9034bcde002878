"""Which settings suit somebody's model: where stage 2 stands and what it leaves, found without labels.

A setting is judged by how far a pruned model's predictions stray from the full model's while it gives the full model's
own answer: KL(full || pruned), summed over that answer. All settings spend the same true average of tokens.
"""

import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from tqdm import tqdm

from .answers import (
    Answer,
    Prompt,
    bare,
    check_prompts,
    greedy,
    installed,
    log_probabilities,
    prepare,
    true_averages,
    visual_tokens,
)
from .colours import BLUE, VERMILION
from .config import PruningConfig, make_config
from .errors import ConfigError, UnsupportedInputError
from .handle import Patch
from .patch import declared
from .pruner import Pruner
from .recommend import merged, recommendation
from .registry import find_parts, unwrap
from .show import need

SEARCHED = ("layer", "stage_ratio", "rounding")
RATIOS = (1.5, 2.0, 4.0)  # beside the usual 3
LAYERS = 10  # about so many are tried
FEW = 48
ONE_SIDED = 0.75
DRAWS = 1000


@dataclass(frozen=True)
class Tried:
    """One setting, as it was measured.

    Attributes:
        name: how tables call it.
        divergence: (n,) nats, KL(full || pruned) of each prompt, summed over the full model's answer.
        average: visual tokens, averaged over the decoder layers and the prompts, as they ran.
    """

    name: str
    config: PruningConfig
    divergence: np.ndarray
    average: float


@dataclass(frozen=True, repr=False)
class Calibration:
    """What `lp_patch.calibrate` found; print it, or read its fields.

    Attributes:
        tried: all settings, the default first, then stage 1 alone.
        chosen: the number of the chosen one.
        stability: in what share of samples of these prompts, drawn with replacement, the same one is chosen.
        scorer: the strategy of stage 1.
        notes: what is doubtful about the prompts.
        pruner: the trained weights that it was measured with, or None.
    """

    tried: tuple[Tried, ...]
    chosen: int
    stability: float
    scorer: str
    notes: tuple[str, ...]
    pruner: Pruner | None

    @property
    def config(self) -> PruningConfig:
        """The settings to give to `apply`."""
        return self.tried[self.chosen].config

    @property
    def n(self) -> int:
        """Prompts."""
        return len(self.tried[0].divergence)

    def gain(self, other: int = 0) -> tuple[float, float]:
        """How much less the chosen setting strays than another one, in nats a prompt, and its paired standard error."""
        return paired(self.tried[other].divergence - self.tried[self.chosen].divergence)

    def to_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and dicts, for JSON."""
        gain, error = self.gain()
        return {
            "config": asdict(self.config),
            "scorer": self.scorer,
            "prompts": self.n,
            "gain": gain,
            "standard_error": error,
            "stability": self.stability,
            "notes": list(self.notes),
            "tried": [
                {
                    "name": x.name,
                    "chosen": number == self.chosen,
                    "average": x.average,
                    "divergence": float(x.divergence.mean()),
                    "standard_error": paired(x.divergence)[1],
                    "divergences": x.divergence.tolist(),
                    "config": asdict(x.config),
                }
                for number, x in enumerate(self.tried)
            ],
        }

    def save(self, folder: str | Path) -> None:
        """Write what ``apply(model, folder)`` reads: the settings, and the pruner if there is one.

        The pruner's own recommended settings (`Pruner.recommended`) then hold these as well, for whoever takes
        it from there with the same strategy and budget.
        """
        self.config.save(folder)
        if self.pruner is not None:
            pruner = deepcopy(self.pruner)
            pruner.recommended = merged(pruner.recommended, self.recommendation())
            pruner.save_pretrained(folder)

    def recommendation(self) -> dict[str, Any]:
        """An entry for `Pruner.recommended`."""
        return recommendation(self.config, self.scorer, self.n)

    def plot(self, path: str | Path) -> None:
        """Draw each setting's divergence with its standard error."""
        need("matplotlib", "evaluate")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1.2 + 0.3 * len(self.tried)), layout="constrained")
        axes = figure.subplots()
        for number, x in enumerate(self.tried):
            mean, error = paired(x.divergence)
            here = number == self.chosen
            axes.errorbar(
                mean,
                number,
                xerr=error,
                marker="D" if here else "o",
                markersize=9 if here else 6,
                color=VERMILION if here else BLUE,
            )
        axes.set_yticks(range(len(self.tried)), [x.name for x in self.tried])
        axes.invert_yaxis()
        axes.set_xlabel(f"KL(full || pruned) of an answer in nats, mean and standard error of {self.n} prompts")
        axes.set_title(f"{self.scorer}, {_budget(self.config)}: {self.tried[self.chosen].name} is chosen")
        axes.grid(alpha=0.25)
        figure.savefig(Path(path), dpi=110)

    def __str__(self) -> str:
        width = max(len("setting"), *(len(x.name) for x in self.tried))
        lines = [
            f"lp_patch: {self.scorer}, {_budget(self.config)}, {self.n} prompts; KL(full || pruned) an answer, in nats",
            f"  {'setting':<{width}} {'tokens':>7} {'KL':>8} {'±':>7} {'default less this':>18}",
        ]
        for number, x in enumerate(self.tried):
            mean, error = paired(x.divergence)
            gain, of_gain = paired(self.tried[0].divergence - x.divergence)
            versus = f"{gain:+.3f} ± {of_gain:.3f}" if number else ""
            mark = ">" if number == self.chosen else " "
            lines.append(f"{mark} {x.name:<{width}} {x.average:>7.1f} {mean:>8.3f} {error:>7.3f} {versus:>18}".rstrip())
        return "\n".join([*lines, self._verdict(), *(f"careful: {note}" for note in self.notes)])

    def _verdict(self) -> str:
        gain, error = self.gain()
        again = f"chosen in {self.stability:.0%} of samples of these prompts"
        if self.chosen == 0:
            return f"The default stays: nothing was better by more than one paired standard error; {again}."
        sure = gain / error if error > 0 else float("inf")
        return (
            f"{self.tried[self.chosen].name}: better than the default by {gain:.3f} nats, {sure:.1f} paired standard "
            f"errors; {again}."
        )

    def __repr__(self) -> str:
        chosen = self.tried[self.chosen].name
        return f"<lp_patch.Calibration of {self.scorer}: {chosen}, of {len(self.tried)} settings on {self.n} prompts>"


class Reference(NamedTuple):
    """The full model's answers to one batch of B prompts.

    Attributes:
        log_probabilities: (B, T, V) float32, on the CPU.
    """

    prompt: Prompt
    answer: Answer
    log_probabilities: Tensor


def calibrate(
    model: nn.Module,
    prompts: Iterable[Any] | list[Reference],
    config: PruningConfig | dict[str, Any] | None = None,
    *,
    pruner: Pruner | str | Path | None = None,
    answer_tokens: int = 32,
    progress: bool = True,
    **options: Any,
) -> Calibration:
    """Find `layer` and `stage_ratio` for this model, scorer and budget, without labels.

    Tried are the default, stage 1 alone, about ten layers at the default ratio, and at the best of them other ratios;
    all with ``rounding="down"``, so that each spends what the budget allows and none spends more. Of these the one that
    strays least from the full model is chosen; but the default, or else stage 1 alone, where it strays no more than
    that by one paired standard error. (Criterion and rule: ours. The paper, section 4, compares layers with labels.)

    Args:
        model: unpatched, or patched by us: then the patch is back at the end, and takes no part.
        prompts: unlabelled processor outputs (dicts of tensors, batched or not, padded on the left), 48 rows or better
            96, of the kinds that the model will be asked. They are kept in memory, and so are the full model's
            probabilities: 4 bytes x vocabulary for each token of its answers. Or what `ask` made of them, which serves
            any number of calibrations.
        config: the other options, as for `apply`; a budget among them (``tokens=32``).
        pruner: as for `apply`.
        answer_tokens: how much of the full model's answer is compared; nothing that `ask` made changes by it.
        progress: show it on stderr.
        options: fields of `PruningConfig` but for those that are searched; they override `config`.

    Raises:
        ConfigError: an option is wrong or is searched, or nothing would be pruned.
        UnsupportedInputError: prompts show no picture.
    """
    base = _base(config, options)
    with bare(model):
        default = prepare(model, base, pruner)
        if default._settings.scorer.keeps_all:
            raise ConfigError(f"scorer={base.scorer!r} has no stage 1 to compare with: take another scorer")
        candidates = _stages(default, model, pruner)
        references = prompts if _asked(prompts) else ask(model, prompts, answer_tokens, progress)
        runs = len(candidates) + len(RATIOS)
        began = time.perf_counter()
        _measure(model, candidates[1], references[:1], None)
        minutes = len(references) * runs * (time.perf_counter() - began) / 60
        _say(progress, f"{runs} settings, a pruned forward a batch each: about {minutes:.1f} minutes")
        with tqdm(desc="lp_patch.calibrate", total=len(references) * runs, disable=not progress) as bar:
            tried = [_measure(model, candidate, references, bar) for candidate in candidates]
            _check_pruned(tried[1], default)
            swept = min((x for x in tried if x.config.stage_ratio > 1), key=lambda x: x.divergence.mean())
            for ratio in RATIOS:
                patch = prepare(model, replace(swept.config, stage_ratio=ratio), pruner)
                tried.append(_measure(model, (_name(patch), patch), references, bar))
    notes = doubts(references)
    for note in notes:
        warnings.warn(f"lp_patch.calibrate: {note}", stacklevel=2)
    divergence = np.stack([x.divergence for x in tried])
    chosen = choose(divergence)
    n = divergence.shape[1]
    drawn = np.random.default_rng(0).integers(0, n, (DRAWS, n))
    stability = float(np.mean([choose(divergence[:, index]) == chosen for index in drawn]))
    settings = default._settings
    return Calibration(tuple(tried), chosen, stability, settings.scorer.name, notes, settings.pruner)


def ask(model: nn.Module, prompts: Iterable[Any], answer_tokens: int = 32, progress: bool = True) -> list[Reference]:
    """The full model's answers, with which `calibrate` may be called for several budgets and scorers.

    Arguments are those of `calibrate`.
    """
    placeholders = [x.placeholder for x in find_parts(model, declared(unwrap(model))).modalities]
    batches = list(check_prompts(prompts))
    rows = sum(len(x["input_ids"]) for x in batches)
    if rows < 2:
        raise ConfigError(f"got {rows} prompts: give {FEW} or more, better twice as many")
    found: list[Reference] = []
    began = time.perf_counter()
    with bare(model):
        for prompt in tqdm(batches, "lp_patch.calibrate, full model", disable=not progress):
            # read again after the prompt, a placeholder would ask for a picture
            answer = greedy(model, prompt, answer_tokens, suppress_tokens=placeholders)
            probable = log_probabilities(model, None, prompt, answer.tokens)
            found.append(Reference(prompt, answer, probable.cpu()))
            if len(found) == 1:
                minutes = len(batches) * (time.perf_counter() - began) / 60
                _say(
                    progress,
                    f"{rows} prompts in {len(batches)} batches, each answered and read by the full model: "
                    f"about {minutes:.1f} minutes",
                )
    return found


def paired(values: np.ndarray) -> tuple[float, float]:
    """Mean of values (n,) and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def choose(divergence: np.ndarray) -> int:
    """The number of the setting to take, of divergences (settings, n); 0 is the default, 1 stage 1 alone.

    The default, or else stage 1 alone where it beats the default, unless the best is better than it by more than one
    paired standard error.
    """
    best = int(divergence.mean(axis=1).argmin())

    def beats(one: int, other: int) -> bool:
        gain, error = paired(divergence[other] - divergence[one])
        return gain > error

    if not beats(best, 0):
        return 0
    return 1 if beats(1, 0) and not beats(best, 1) else best


def doubts(references: Sequence[Reference]) -> tuple[str, ...]:
    """What makes the prompts doubtful as a sample."""
    answers: Counter[tuple[int, ...]] = Counter()
    questions: Counter[tuple[int, ...]] = Counter()
    for prompt, answer, _ in references:
        answers.update(tuple(x[keep].tolist()) for x, keep in zip(answer.tokens, answer.valid, strict=True))
        ids = prompt["input_ids"]
        mask = prompt.get("attention_mask", torch.ones_like(ids)).bool()
        # an image's placeholders repeat, as many as it has tokens: once will do
        questions.update(tuple(x[keep].unique_consecutive().tolist()) for x, keep in zip(ids, mask, strict=True))
    n = sum(answers.values())
    if n < FEW:
        return (f"{n} prompts are too few to tell settings apart: give {FEW} or more, better twice as many",)
    notes = []
    common = sum(count for _, count in answers.most_common(2)) / n
    if common > ONE_SIDED:
        notes.append(
            f"two answers make up {common:.0%} of the full model's: prompts of one kind mislead, give mixed ones"
        )
    same = questions.most_common(1)[0][1] / n
    if same > ONE_SIDED:
        notes.append(f"{same:.0%} of the prompts ask the same: the settings suit that question, perhaps no other")
    return tuple(notes)


def _base(config: PruningConfig | dict[str, Any] | None, options: dict[str, Any]) -> PruningConfig:
    """The options that all settings share, with the default layer and ratio."""
    base = make_config(config, options)
    usual = PruningConfig()
    for name in SEARCHED:
        if getattr(base, name) != getattr(usual, name) and (name, getattr(base, name)) != ("rounding", "down"):
            raise ConfigError(
                f'calibrate finds layer and stage_ratio itself, and compares with rounding="down": leave out {name}'
            )
    return replace(base, rounding="down")


def _stages(default: Patch, model: nn.Module, pruner: Any) -> list[tuple[str, Patch]]:
    """The settings to try at first: the default, stage 1 alone, other layers."""
    shape, parts, config = default._settings.shape, default._parts, default.config
    able = parts.kinds.scoring()
    able = [x for x in able if x >= parts.first_cut and (shape.wipe_layer is None or x < shape.wipe_layer)]
    at = able.index(shape.layer) if shape.layer in able else 0
    step = max(1, round(len(able) / LAYERS))
    alone = replace(config, stage_ratio=1, text_scorer=PruningConfig.text_scorer)
    others = [replace(config, layer=x) for x in able[at % step :: step] if x != shape.layer]
    patches = [prepare(model, x, pruner) for x in (alone, *others)]
    return [(f"default ({_name(default)})", default), *((_name(x), x) for x in patches)]


def _measure(
    model: nn.Module, candidate: tuple[str, Patch], references: Sequence[Reference], bar: tqdm | None
) -> Tried:
    """One setting on all prompts."""
    name, patch = candidate
    found: list[Tensor] = []
    averages: list[float] = []
    for prompt, answer, full in references:
        with installed(patch):
            pruned = log_probabilities(model, patch, prompt, answer.tokens)
            averages += true_averages(patch)
            shown = visual_tokens(patch)
        if 0 in shown:
            raise UnsupportedInputError(f"prompt {len(found)} of a batch shows no picture: nothing to prune there")
        nats = kl_div(pruned, full.to(pruned.device), log_target=True, reduction="none").sum(dim=-1)
        found.append((nats * answer.valid).sum(dim=1).double().cpu())
        if bar is not None:
            bar.update()
    divergence = torch.cat(found).numpy()
    if not np.isfinite(divergence).all():
        raise UnsupportedInputError(f"{name}: the model's probabilities are not finite: no setting can be judged")
    return Tried(name, patch.config, divergence, float(np.mean(averages)))


def _check_pruned(alone: Tried, default: Patch) -> None:
    trace = default.trace
    if trace is not None and alone.average >= float(np.mean(trace.visual_tokens)):
        raise ConfigError(
            f"{_budget(alone.config)} prunes nothing of prompts with {trace.visual_tokens[0]} visual tokens: give less"
        )


def _name(patch: Patch) -> str:
    ratio = patch.config.stage_ratio
    return "stage 1 alone" if ratio == 1 else f"layer {patch._settings.shape.layer}, ratio {ratio:g}"


def _budget(config: PruningConfig) -> str:
    return f"tokens={config.tokens}" if config.tokens is not None else f"ratio={config.ratio:.4g}"


def _asked(prompts: object) -> TypeGuard[list[Reference]]:
    return isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], Reference)


def _say(progress: bool, text: str) -> None:
    if progress:
        print(f"lp_patch.calibrate: {text}", file=sys.stderr, flush=True)
