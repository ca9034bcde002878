"""What a strategy is, the catalogue by name, and how names resolve."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError
from ..pruner import LearnablePruner


@dataclass(frozen=True)
class Stage1Input:
    """What a stage-1 scorer may read.

    Attributes:
        features: (B, N, C), the tokens of B equally long visual inputs, as the projector would receive them.
        keep: tokens that will be chosen by score, ``1 <= keep <= N``.
        seed: `PruningConfig.seed`.
        cls_attention: (B, N) float32, attention from [CLS] to each token, for scorers that declare it.
        pruner: the learned module, for the scorer "learned".
    """

    features: Tensor
    keep: int
    seed: int
    cls_attention: Tensor | None = None
    pruner: LearnablePruner | None = None


@dataclass(frozen=True)
class Scorer:
    """A catalogue entry: `score` maps a `Stage1Input` to (B, N) scores; None means farthest points alone."""

    name: str
    source: str
    score: Callable[[Stage1Input], Tensor] | None
    needs_cls_attention: bool = False
    needs_pruner: bool = False


SCORERS: dict[str, Scorer] = {}
TEXT_SCORERS: dict[str, Callable[..., Tensor]] = {}


def resolve_scorer(name: str, pruner: LearnablePruner | None) -> Scorer:
    """The stage-1 strategy that `name` means; "auto" is "learned" where a pruner is given, else "diversity"."""
    if name == "auto":
        name = "learned" if pruner is not None else "diversity"
    if name not in SCORERS:
        raise ConfigError(f"unknown scorer {name!r}. Allowed: auto, {', '.join(sorted(SCORERS))}")
    scorer = SCORERS[name]
    if scorer.needs_pruner and pruner is None:
        raise ConfigError(f'scorer="{name}" needs trained weights: pass pruner=..., or scorer="diversity"')
    if pruner is not None and not scorer.needs_pruner:
        raise ConfigError(f'a pruner was given but scorer="{name}" does not use it: drop one of the two')
    return scorer


def resolve_text_scorer(name: str) -> Callable[..., Tensor]:
    """The stage-2 strategy that `name` means."""
    if name not in TEXT_SCORERS:
        raise ConfigError(f"unknown text_scorer {name!r}. Allowed: {', '.join(sorted(TEXT_SCORERS))}")
    return TEXT_SCORERS[name]


def register(scorer: Scorer) -> None:
    """Add a strategy to the catalogue."""
    SCORERS[scorer.name] = scorer
