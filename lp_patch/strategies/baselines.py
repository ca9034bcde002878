"""What every method must beat, and no stage 1 at all. Their scores are one operator each: they look at no feature."""

import functools

import torch
from torch import Tensor

from ..select import operator
from .base import Scorer, Stage1Input, register


def random(x: Stage1Input) -> Tensor:
    """(B, N), one draw for all inputs, so that a row of a batch keeps what it would keep alone."""
    return _random_scores(x.features, x.seed)


def uniform(x: Stage1Input) -> Tensor:
    """(B, N), 1 at `keep` evenly spaced centres."""
    return _uniform_scores(x.features, x.keep)


@operator
def _random_scores(features: Tensor, seed: int) -> Tensor:
    batch, n_tokens, _ = features.shape
    return _draw(n_tokens, seed, features.device).repeat(batch, 1)


@operator
def _uniform_scores(features: Tensor, keep: int) -> Tensor:
    batch, n_tokens, _ = features.shape
    index = (2 * torch.arange(keep, device=features.device) + 1) * n_tokens // (2 * keep)
    scores = torch.zeros(batch, n_tokens, dtype=torch.float32, device=features.device)
    return scores.index_fill_(1, index, 1.0)


@_random_scores.register_fake
@_uniform_scores.register_fake
def _(features: Tensor, number: int) -> Tensor:
    return features.new_empty(features.shape[:2], dtype=torch.float32)


@functools.cache  # for good: captured graphs read it
def _draw(n_tokens: int, seed: int, device: torch.device) -> Tensor:
    """(N,), the same on every device: drawn on the host, and uploaded once, since that waits for the device."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(n_tokens, generator=generator, dtype=torch.float32, device="cpu").to(device)


register(Scorer("random", "baseline: one seeded draw", random))
register(Scorer("uniform", "baseline: evenly spaced in raster order", uniform))
register(Scorer("none", "no stage 1: the layers up to stage 2 run on all tokens, and the budget pays", keeps_all=True))
