"""Tokens that are mixtures of others (MetaCompress, arXiv 2603.21701): weights, places, the mixing."""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedInputError
from .pruner import Pruner


class MergingPruner(Pruner):
    """Weights by which the tokens of a picture are mixed into a few (MetaCompress).

    ``P = softmax(Q diag(b) K^T / sqrt(d))``, with ``K = (X + E) W_k`` of all tokens and ``Q = pool(X + E) W_q`` of as
    many cells as tokens are asked for. W_q begins as W_k. Ours: X is normalised, E begins as sines of the row and the
    column, and the cells are those of a grid as square as their number allows, so that one module serves every budget.

    Args:
        hidden_size: width C of the features that it reads, the projector's input.
        key_size: width d of queries and keys.
        side: tokens along each side of the square that it was trained on.
        facts: what is known of the weights, see `lp_patch.pruner.Pruner`.
    """

    kind = "metacompress"
    sizes = ("hidden_size", "key_size", "side")
    about = (
        "(after MetaCompress, arXiv 2603.21701): it mixes the {side} x {side} visual tokens of a picture,"
        "\n{hidden_size}-wide features, into a few."
    )
    key_size: int
    side: int

    def __init__(self, hidden_size: int, key_size: int, side: int, **facts: Any) -> None:
        super().__init__({"hidden_size": hidden_size, "key_size": key_size, "side": side}, **facts)
        self.places = nn.Parameter(sines(side, hidden_size))
        self.query, self.key = (nn.Linear(hidden_size, key_size, bias=False) for _ in range(2))
        self.query.load_state_dict(self.key.state_dict())
        self.factors = nn.Parameter(torch.ones(key_size))

    def forward(self, x: Tensor, count: int) -> Tensor:
        """The weights P (B, count, N) of features x (B, N, C), in the module's dtype; each row sums to 1."""
        tokens = nn.functional.layer_norm(x, x.shape[-1:]) + self.places
        query = self.query(cells(self.side, count, x.device).to(x.dtype) @ tokens) * self.factors
        return (query @ self.key(tokens).transpose(1, 2) * self.key_size**-0.5).softmax(dim=2)

    def mix(self, x: Tensor, count: int) -> Tensor:
        """P in float32: x (B, N, C), any float dtype and device -> (B, count, N).

        Raises:
            UnsupportedInputError: N is not ``side * side``.
        """
        if x.shape[1] != self.side**2:
            raise UnsupportedInputError(
                f"these weights mix the {self.side} x {self.side} tokens of a picture, this one has {x.shape[1]}: give "
                "pictures of the size that they were trained on, or use a scorer that takes any number"
            )
        self.follow(x)
        with torch.autocast(x.device.type, enabled=False):
            return self(x.to(self.key.weight.dtype), count).float()


def sines(side: int, width: int) -> Tensor:
    """(side * side, width) float32: sines and cosines of each token's row, then of its column."""
    numbers = torch.arange(side, dtype=torch.float32)
    rates = 1 / side ** (torch.arange(0, width, 4)[: max(1, width // 4)] / max(1, width))
    waves = torch.cat([(numbers[:, None] * rates).sin(), (numbers[:, None] * rates).cos()], dim=1)
    table = torch.cat([waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)], dim=1)
    return nn.functional.pad(table, (0, max(0, width - table.shape[1])))[:, :width]


@functools.cache  # for good: captured graphs read it
def cells(side: int, count: int, device: torch.device) -> Tensor:
    """Average pooling of a square of tokens to `count` cells: (count, side * side) float32, rows sum to 1.

    As many bands of rows as the rounded up root of `count`, each cut into as many columns as come to it.
    """
    bands = math.isqrt(count - 1) + 1
    ends = [count * (band + 1) // bands for band in range(bands)]
    pool = torch.zeros(count, side, side)
    for band, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        rows = _span(side, band, bands)
        for number in range(start, end):
            pool[number, rows, _span(side, number - start, end - start)] = 1
    with torch.inference_mode(False):
        return (pool / pool.sum(dim=(1, 2), keepdim=True)).flatten(1).to(device)


def _span(length: int, number: int, parts: int) -> slice:
    """Part `number` of `length` places in `parts` equal ones, which overlap where they do not divide it."""
    return slice(length * number // parts, -(-length * (number + 1) // parts))


def standing(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Where mixtures stand: each at the mean place of what it is made of, and no two at the same.

    Means are rounded; one whose place is taken moves to the next free one, and where the end is reached, back.

    Args:
        weights: (B, M, N), rows sum to 1, ``M <= N``.

    Returns:
        (B, M) int64 into the mixtures, their order by mean place; and (B, M) int64, distinct and ascending, in
        ``[0, N)``.
    """
    count, n_tokens = weights.shape[1:]
    numbers = torch.arange(n_tokens, device=weights.device)
    mean, order = (weights.double() @ numbers.double()).sort(dim=1, stable=True)
    room = numbers[:count]
    return order, (mean.round().long() - room).cummax(dim=1).values.clamp(0, n_tokens - count) + room


def mixed(x: Tensor, weights: Tensor) -> Tensor:
    """Mixtures of tokens: x (B, N, C), weights (B, M, N) -> (B, M, C) in x's dtype, summed in float32 or wider."""
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, weights.dtype)
        return (weights.to(wide) @ x.to(wide)).to(x.dtype)
