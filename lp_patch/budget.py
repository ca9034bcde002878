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
    average: float, present: int, n_layers: int, layer: int, wipe_layer: int | None = None, rounding: str = "up"
) -> StageBudget:
    """The budget without stage 1: k layers run on all N tokens, so ``R2 = ceil((L R - k N) / (w - k))``, ``R1 = N``.

    R2 clips to the tokens present; a budget at or above that number keeps everything. Arguments are those of
    `stage_budget`; rounded down, R2 is still 1 at least.

    Raises:
        ConfigError: the first k layers alone cost the budget or more, which leaves no token to the others.
    """
    wipe = n_layers if wipe_layer is None else wipe_layer
    if average >= present:
        return StageBudget(present, present)
    exact = (n_layers * average - layer * present) / (wipe - layer)
    if exact <= _EPSILON:
        tokens = f" (tokens={layer * present // n_layers + 1} for an input of {present})" if present > 1 else ""
        raise ConfigError(
            f'scorer="none" runs {layer} of {n_layers} decoder layers on all visual tokens, so {average / present:.4g} '
            f"of them on average is too few: give a ratio above {layer / n_layers:.4g}{tokens}, or a smaller layer"
        )
    return StageBudget(present, min(_whole(exact, rounding), present))


def stage_budget(
    average: float,
    present: int,
    n_layers: int,
    layer: int,
    stage_ratio: float,
    wipe_layer: int | None = None,
    rounding: str = "up",
) -> StageBudget:
    """Split an average budget over the two stages: ``R2 = ceil(L R / (r k + w - k))``, ``R1 = round(r R2)``.

    Rounded down (ours) the budget is kept: R2 is the floor, and R1 takes what that leaves, ``(L R - (w - k) R2) / k``;
    where this is more than there is, the rest goes back to R2. The average is then less than a token below R, and above
    it only where R is less than one token.

    Both clip to the tokens present; a budget at or above that number keeps everything.

    Args:
        average: budget, visual tokens averaged over all decoder layers, > 0.
        present: visual tokens of this input, >= 1.
        n_layers: decoder layers (L).
        layer: layers that run on the stage-1 tokens (k), ``1 <= k < L``.
        stage_ratio: R1 : R2 (r), >= 1; 1 means that stage 2 is off.
        wipe_layer: layers that see any visual token at all (w), ``k < w <= L``; None means all.
        rounding: "up", the paper's, whose average may exceed R; or "down".
    """
    wipe = n_layers if wipe_layer is None else wipe_layer
    if average >= present:
        return StageBudget(present, present)
    total = n_layers * average
    stage2 = min(_whole(total / (stage_ratio * layer + wipe - layer), rounding), present)
    if rounding == "up" or stage_ratio == 1:
        return StageBudget(min(round(stage_ratio * stage2), present), stage2)
    stage1 = _whole((total - (wipe - layer) * stage2) / layer, rounding)
    if stage1 >= present:
        return StageBudget(present, min(_whole((total - layer * present) / (wipe - layer), rounding), present))
    return StageBudget(max(stage1, stage2), stage2)


def _whole(number: float, rounding: str) -> int:
    """The number rounded up or down, at least 1."""
    return max(1, math.ceil(number - _EPSILON) if rounding == "up" else math.floor(number + _EPSILON))
