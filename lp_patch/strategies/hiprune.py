"""HiPrune (arXiv 2508.00553): objects by a middle layer of the encoder, their surroundings, and a global rest."""

import math

import torch
from torch import Tensor

from ..errors import UnsupportedInputError
from ..select import top_indices
from .base import Reading, Scorer, Stage1Input, register

SHARE = 0.1  # of the kept tokens, for objects with their surroundings
OBJECT_LAYER = 9 / 23  # CLIP's 9th of the 23 that LLaVA uses; the same share of other depths is ours


def select(x: Stage1Input) -> Tensor:
    """(B, keep): anchors by the middle layer, their grid neighbours, registers by the last layer."""
    middle, last = x.attention
    batch, n_tokens = middle.shape
    side = math.isqrt(n_tokens)
    if side * side != n_tokens:
        raise UnsupportedInputError(
            f'scorer="hiprune" needs the neighbours of a token in a square grid of patches, got {n_tokens} tokens: use '
            'another scorer, such as "vispruner"'
        )
    anchors = torch.zeros_like(middle, dtype=torch.bool)
    anchors.scatter_(1, top_indices(middle, round(SHARE * x.keep / 5)), True)
    grid = anchors.view(batch, side, side)
    chosen = grid.clone()
    chosen[:, 1:] |= grid[:, :-1]
    chosen[:, :-1] |= grid[:, 1:]
    chosen[:, :, 1:] |= grid[:, :, :-1]
    chosen[:, :, :-1] |= grid[:, :, 1:]
    return top_indices(last.masked_fill(chosen.view(batch, n_tokens), torch.inf), x.keep)


register(
    Scorer(
        "hiprune",
        "HiPrune (2508.00553): by attention received, top tokens of a middle layer, their 4 neighbours (in the grid: "
        "its code wraps to the next row), the rest by the last layer",
        select=select,
        reads=(Reading("all", OBJECT_LAYER), Reading("all")),
    )
)
