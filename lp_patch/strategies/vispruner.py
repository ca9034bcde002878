"""VisPruner (arXiv 2412.01818): tokens that [CLS] attends to, and of the others those without a duplicate."""

import torch
from torch import Tensor

from ..select import cosines, take, top_indices
from .base import Reading, Scorer, Stage1Input, register

IMPORTANT = 0.5  # share of the kept tokens, as in most of the paper's runs
AT_ONCE = 8


def select(x: Stage1Input) -> Tensor:
    """(B, keep). Others, best first, are dealt into two halves; of the first go those most like one of the second."""
    (attention,) = x.attention
    with torch.autocast(x.features.device.type, enabled=False):
        table = cosines(x.features)
    important, others = top_indices(attention, attention.shape[1]).tensor_split([int(IMPORTANT * x.keep)], dim=1)
    diverse = x.keep - important.shape[1]
    while others.shape[1] > diverse:
        first, second = others[:, ::2], others[:, 1::2]
        nearest = take(take(table, first).transpose(1, 2), second).amax(dim=1)
        gone = min(AT_ONCE, others.shape[1] - diverse)
        most_alike = top_indices(nearest, first.shape[1])
        others = torch.cat([first.gather(1, most_alike[:, gone:]), second], dim=1)
    return torch.cat([important, others], dim=1)


register(
    Scorer(
        "vispruner",
        "VisPruner (2412.01818): half by [CLS] attention, the rest by removing what has a duplicate, 8 at a time",
        select=select,
        reads=(Reading(),),
    )
)
