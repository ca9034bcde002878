"""Where the survivors stand: position ids of a pruned prompt, and how kept places travel inside the features."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BASE = 128  # of a digit: bfloat16 holds integers up to 256 exactly


class Span(NamedTuple):
    """One picture in a pruned prompt.

    Attributes:
        start: place of its first token that is left.
        kept: how many are left, one after the other.
        advance: how far the positions go on from its first to what follows it, as in the unpruned prompt.
    """

    start: int
    kept: int
    advance: int


def prompt_positions(length: int, spans: Sequence[Span]) -> tuple[Tensor, int]:
    """Position ids of a pruned prompt, in which all tokens of a picture stand at the picture's start.

    What a token adds to that goes with the features (`digits`), since only the encoder knows which are left.

    Args:
        length: tokens of the pruned prompt.
        spans: its pictures, ascending, without overlap.

    Returns:
        (length,) int64; and what to add to a later token's place to have its position.
    """
    steps = np.ones(length + 1, dtype=np.int64)
    for start, kept, advance in spans:
        steps[start + 1 : start + kept] = 0
        steps[start + kept] = advance
    positions = torch.from_numpy(np.cumsum(steps) - 1)
    return positions[:-1], int(positions[-1]) - length


def to_digits(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, A) integers in [0, 128 ** 2) -> (N, 2 A) in a float dtype, all of which it holds exactly."""
    return torch.cat([numbers // BASE, numbers % BASE], dim=1).to(dtype)


def from_digits(digits: Tensor) -> Tensor:
    """(N, 2 A) as `to_digits` wrote it -> (N, A) int64."""
    high, low = digits.long().chunk(2, dim=1)
    return high * BASE + low
