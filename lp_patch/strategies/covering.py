"""The learned scores, spread over what they find (ours): a token that resembles a kept one counts for less."""

from torch import Tensor

from ..pruner import LearnablePruner
from ..select import covering_points
from .base import Scorer, Stage1Input, register


def select(x: Stage1Input) -> Tensor:
    """(B, keep)."""
    assert isinstance(x.pruner, LearnablePruner)  # `resolve_scorer` refuses the combination
    return covering_points(x.features, x.pruner.score(x.features), x.keep)


register(
    Scorer(
        "covering",
        "ours: LearnPruner's keep probability times (1 - cosine to the nearest kept token), chosen one by one",
        select=select,
        needs_pruner=True,
    )
)
