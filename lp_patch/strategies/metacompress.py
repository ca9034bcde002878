"""MetaCompress (arXiv 2603.21701): tokens that are mixtures of the picture's, by trained weights."""

from torch import Tensor

from ..merging import MergingPruner
from .base import Scorer, Stage1Input, register


def mix(x: Stage1Input) -> Tensor:
    """(B, keep, N) weights, whose rows sum to 1."""
    assert isinstance(x.pruner, MergingPruner)  # `resolve_scorer` refuses the combination
    return x.pruner.mix(x.features, x.keep)


register(
    Scorer(
        MergingPruner.kind,
        "MetaCompress (2603.21701): keeps no token as it is, but mixtures P X of all, before the projector; trained "
        "against the full model's answers; needs its own weights and a projector that works token by token",
        mix=mix,
        needs_pruner=True,
        kind=MergingPruner.kind,
    )
)
