"""Text attention, spread over what it finds (ours): a token that resembles a kept one counts for less."""

import torch
from torch import Tensor

from ..select import covering_points
from .base import Stage2Input, TextScorer, attention_received, register
from .text import text_query_weights


def score(x: Stage2Input) -> Tensor:
    """(B, N) float32: 1, 1/2, 1/3, ... in the order in which tokens are chosen, 0 for the others."""
    n_tokens, seen = x.visual.shape[1], x.visual[..., None]
    value = x.value[:, :, -n_tokens:].transpose(1, 2).flatten(2).float()
    # cosines are taken about the row's mean, which other tokens and padding must not move
    mean = (value * seen).sum(dim=1, keepdim=True) / seen.sum(dim=1, keepdim=True).clamp(min=1)
    received = attention_received(x).masked_fill(~x.visual, 0.0)
    chosen = covering_points(torch.where(seen, value, mean), received, min(x.keep, n_tokens))
    place = torch.arange(1, chosen.shape[1] + 1, dtype=torch.float32, device=chosen.device)
    return torch.zeros_like(received).scatter(1, chosen, (1 / place).expand_as(chosen))


register(
    TextScorer(
        "spread",
        "ours: attention from the text after the images times (1 - cosine of values to the nearest kept token), "
        "chosen one by one",
        text_query_weights,
        score,
    )
)
