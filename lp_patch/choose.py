"""Running the strategies: which tokens stage 1 keeps, and what stage 2 thinks of those that are left."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from .budget import StageBudget
from .config import PruningConfig
from .errors import ConfigError
from .merging import standing
from .pruner import Pruner
from .select import select_tokens, take
from .settings import Settings
from .strategies import Reading, Scorer, Stage1Input, Stage2Input


class Pruning(Protocol):
    """What stage 1 reads of the settings."""

    @property
    def config(self) -> PruningConfig:
        """The options."""

    @property
    def pruner(self) -> Pruner | None:
        """Trained weights."""

    def budget(self, present: int) -> StageBudget:
        """What a visual input of `present` tokens keeps."""


def stage1(
    settings: Pruning, scorer: Scorer, features: Tensor, attention: dict[Reading, Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Choose among the tokens of equally long visual inputs, or mix them.

    Args:
        scorer: the settings' own, or the one in its place where it cannot be asked.
        features: (B, N, C).
        attention: what the scorer reads in the vision encoder, (B, N) or (B, N, C) each.

    Returns:
        (B, R1) int64, ascending, or None for all of them; the scores (B, N) float32 behind them, or None; and the
        weights (B, R1, N) of which the tokens that stand there are mixtures, or None where they are as they were.
    """
    batch, present, _ = features.shape
    keep = settings.budget(present).stage1
    if keep >= present:
        return None, None, None
    config = settings.config
    given = Stage1Input(features, keep, config.seed, tuple(attention[x] for x in scorer.reads), settings.pruner)
    if scorer.mix is not None:
        # weights in training learn from what becomes of the mixtures
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and settings.pruner is not None and settings.pruner.training
        ):
            weights = scorer.mix(given).float()
            _check_shape(scorer.name, weights, (batch, keep, present))
            order, places = standing(weights.detach())
            return places, None, take(weights, order)
    with torch.no_grad():
        if scorer.select is not None:
            index = scorer.select(given)
            _check_shape(scorer.name, index, (batch, keep))
            return index.sort(dim=1).values, None, None
        scores = None
        if scorer.score is not None:
            by_score = max(1, keep - round(config.diversity * keep))
            scores = scorer.score(replace(given, keep=by_score)).float()
            _check_shape(scorer.name, scores, (batch, present))
        return select_tokens(features, scores, keep, config.diversity), scores, None


def stage1_apart(
    settings: Pruning, scorer: Scorer, features: Sequence[Tensor], attention: Mapping[Reading, Sequence[Tensor]] = {}
) -> list[tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The same for inputs of any lengths, (N, C) each, and what the scorer reads of each: indices (R1,), scores (N,),
    weights (R1, N) of each.
    """
    found: list[tuple[Tensor | None, Tensor | None, Tensor | None]] = [(None, None, None)] * len(features)
    for present in sorted({len(x) for x in features}):
        same = [i for i, x in enumerate(features) if len(x) == present]
        seen = {reading: torch.stack([x[i] for i in same]) for reading, x in attention.items()}
        answer = stage1(settings, scorer, torch.stack([features[i] for i in same]), seen)
        for number, i in enumerate(same):
            index, score, weights = (None if x is None else x[number] for x in answer)
            found[i] = index, score, weights
    return found


def stage2(settings: Settings, given: Stage2Input) -> Tensor:
    """Scores (B, N) float32 of the tokens that stage 1 left."""
    with torch.no_grad():
        scores = settings.text_scorer.score(given).float()
    _check_shape(settings.text_scorer.name, scores, tuple(given.visual.shape))
    return scores


def _check_shape(strategy: str, answer: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what a strategy from outside must not answer."""
    if answer.shape != shape:
        raise ConfigError(f"the strategy {strategy!r} answered {tuple(answer.shape)}, {shape} was asked for")
