"""LearnPruner's stage 1 (arXiv 2604.23950, section 3)."""

from torch import Tensor

from ..pruner import LearnablePruner
from .base import Scorer, Stage1Input, register


def score(x: Stage1Input) -> Tensor:
    """(B, N) keep probability."""
    assert isinstance(x.pruner, LearnablePruner)  # `resolve_scorer` refuses the combination
    return x.pruner.score(x.features)


register(
    Scorer(
        "learned",
        "LearnPruner (2604.23950), section 3: keep probability of the trained module",
        score,
        needs_pruner=True,
    )
)
