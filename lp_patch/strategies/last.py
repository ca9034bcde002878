"""The last token of the prompt asks: as a ranking, and as FastV (arXiv 2403.06764), a method without stage 1."""

import torch
from torch import Tensor

from .base import TextScorer, register


def last_query_weights(is_text: Tensor, is_visual: Tensor, kept: Tensor | None = None) -> Tensor:
    """All weight on the last token that is left: arguments as for `text_query_weights`, (B, S) -> (B, S) float32."""
    left = is_text | is_visual if kept is None else (is_text | is_visual) & kept
    positions = torch.arange(left.shape[1], device=left.device)
    last = torch.where(left, positions, -1).amax(dim=1, keepdim=True)
    return (positions == last).float()


register(TextScorer("last", "attention from the last token of the prompt alone: FastV's ranking", last_query_weights))
register(
    TextScorer(
        "fastv",
        "FastV (2403.06764): the ranking of last after 2 layers, without stage 1. So its released code; the paper says "
        "the mean over all queries",
        last_query_weights,
        layer=2,
        alone=True,
    )
)
