"""HunYuan-VL: an image begins, ends and breaks its lines with learnt rows among its features; four position axes."""

from typing import Any

import torch
from torch import Tensor

from lp_patch.layout import rows_of_patches
from lp_patch.registry import Adapter


def marks(base: Any, embeds: Tensor) -> Tensor:
    """Rows of embeds (B, S, D) that are a learnt beginning, end or line break: (B, S) bool.

    A line break goes through a matrix product with the patches of its image, so it is equal but for rounding.
    """
    merger = base.vision_tower.patch_merger
    found = torch.zeros(embeds.shape[:-1], dtype=torch.bool, device=embeds.device)
    for mark in (merger.image_begin, merger.mlp(merger.image_newline), merger.image_end):
        row = merger.after_rms(mark).to(embeds)
        found |= (embeds - row).float().norm(dim=-1) <= 0.02 * row.float().norm()
    return found


ADAPTER = Adapter(model_type="hunyuan_vl", family="HunYuan-VL", structural=marks, layout=rows_of_patches)
