"""How many visual tokens each stage keeps. Pure arithmetic, no tensors.

The budget is the average number of visual tokens over all decoder layers (LearnPruner, section 4).
"""

import math
from typing import NamedTuple

from .errors import ConfigError

_EPSILON = 1e-9  # float noise must not push an exact quotient over the next integer


class StageBudget(NamedTuple):
    """Tokens that one visual input keeps after each stage."""

    stage1: int
    stage2: int


def default_layer(n_layers: int) -> int:
    """Number of decoder layers that run on the stage-1 tokens: the paper's 12 of 32, scaled and rounded.

    Args:
        n_layers: decoder layers of the language model, at least 2.

    Returns:
        k, counted from 1, in ``[1, n_layers - 1]``.
    """
    return min(max(round(0.375 * n_layers), 1), n_layers - 1)


def inside_budget(
    average: float, present: int, n_layers: int, layer: int, wipe_layer: int | None = None
) -> StageBudget:
    """The budget without stage 1: k layers run on all N tokens, so ``R2 = ceil((L R - k N) / (w - k))``, ``R1 = N``.

    R2 clips to the tokens present; a budget at or above that number keeps everything. Arguments are those of
    `stage_budget`.

    Raises:
        ConfigError: the first k layers alone cost the budget or more, which leaves no token to the others.
    """
    wipe = n_layers if wipe_layer is None else wipe_layer
    if average >= present:
        return StageBudget(present, present)
    stage2 = math.ceil((n_layers * average - layer * present) / (wipe - layer) - _EPSILON)
    if stage2 < 1:
        tokens = f" (tokens={layer * present // n_layers + 1} for an input of {present})" if present > 1 else ""
        raise ConfigError(
            f'scorer="none" runs {layer} of {n_layers} decoder layers on all visual tokens, so {average / present:.4g} '
            f"of them on average is too few: give a ratio above {layer / n_layers:.4g}{tokens}, or a smaller layer"
        )
    return StageBudget(present, min(stage2, present))


def stage_budget(
    average: float, present: int, n_layers: int, layer: int, stage_ratio: float, wipe_layer: int | None = None
) -> StageBudget:
    """Split an average budget over the two stages: ``R2 = ceil(L R / (r k + w - k))``, ``R1 = round(r R2)``.

    Both clip to the tokens present; a budget at or above that number keeps everything.

    Args:
        average: budget, visual tokens averaged over all decoder layers, > 0.
        present: visual tokens of this input, >= 1.
        n_layers: decoder layers (L).
        layer: layers that run on the stage-1 tokens (k), ``1 <= k < L``.
        stage_ratio: R1 : R2 (r), >= 1; 1 means that stage 2 is off.
        wipe_layer: layers that see any visual token at all (w), ``k < w <= L``; None means all.
    """
    wipe = n_layers if wipe_layer is None else wipe_layer
    if average >= present:
        return StageBudget(present, present)
    stage2 = max(1, math.ceil(n_layers * average / (stage_ratio * layer + wipe - layer) - _EPSILON))
    return StageBudget(min(round(stage_ratio * stage2), present), min(stage2, present))
