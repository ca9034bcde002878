"""What every method must beat, and no stage 1 at all."""

import torch
from torch import Tensor

from .base import Scorer, Stage1Input, register


def random(x: Stage1Input) -> Tensor:
    """(B, N), one draw for all inputs, so that a row of a batch keeps what it would keep alone."""
    generator = torch.Generator().manual_seed(x.seed)
    batch, n_tokens, _ = x.features.shape
    return torch.rand(n_tokens, generator=generator).to(x.features.device).expand(batch, n_tokens)


def uniform(x: Stage1Input) -> Tensor:
    """(B, N), 1 at `keep` evenly spaced centres."""
    batch, n_tokens, _ = x.features.shape
    index = ((2 * torch.arange(x.keep) + 1) * n_tokens) // (2 * x.keep)
    return torch.zeros(n_tokens).index_fill_(0, index, 1.0).to(x.features.device).expand(batch, n_tokens)


register(Scorer("random", "baseline: one seeded draw", random))
register(Scorer("uniform", "baseline: evenly spaced in raster order", uniform))
register(Scorer("none", "no stage 1: the layers up to stage 2 run on all tokens, and the budget pays", keeps_all=True))
