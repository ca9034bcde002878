"""OC-VTP (arXiv 2511.20439): a token for each part of the picture, found by slots in an early layer."""

import torch
from torch import Tensor

from ..select import top_indices
from ..slots import SlotPruner, received_weights
from .base import Reading, Scorer, Stage1Input, register

LAYER = 9 / 23  # CLIP's 9th of the 23 that LLaVA uses; the same share of other depths is ours


def select(x: Stage1Input) -> Tensor:
    """(B, keep): of each of `keep` slots the token that it holds most of; where two agree, the most received others."""
    assert isinstance(x.pruner, SlotPruner)  # `resolve_scorer` refuses the combination
    (tokens,) = x.attention
    return slot_tokens(x.pruner.compete(tokens, x.keep, x.seed))


def slot_tokens(shares: Tensor) -> Tensor:
    """The shares (B, K, N), K <= N, of tokens that slots hold -> (B, K) int64, distinct."""
    weights = received_weights(shares)
    received = weights.sum(dim=1).scatter(1, weights.argmax(dim=2), torch.inf)
    return top_indices(received, shares.shape[1])


register(
    Scorer(
        SlotPruner.kind,
        "OC-VTP (2511.20439): slot attention over the encoder's tokens after 9/23 of its layers, trained without the "
        "language model (ours: the same slots at each start); needs its own weights and a family with [CLS]",
        select=select,
        reads=(Reading("tokens", LAYER),),
        needs_pruner=True,
        kind=SlotPruner.kind,
    )
)
