"""LLaVA-NeXT: tiles of the image behind a small copy of it; padding is cut off, and every row ends in a line break.

The projector runs on tiles, before padding is cut: stage 1 prunes what comes out of the packing instead, all tiles of
an image in one ranking.
"""

from typing import Any

import torch
from torch import Tensor

from lp_patch.adapters.llava import patches, tower
from lp_patch.layout import Pixels, packed
from lp_patch.registry import Adapter


def newlines(base: Any, embeds: Tensor) -> Tensor:
    """Rows of embeds (B, S, D) that are the learnt line break: (B, S) bool."""
    found = torch.zeros(embeds.shape[:-1], dtype=torch.bool, device=embeds.device)
    # under autocast the line break was rounded to the features' dtype on its way
    for dtype in {embeds.dtype, torch.bfloat16, torch.float16}:
        newline = base.image_newline.to(embeds.device).to(dtype).to(embeds.dtype)
        found |= (embeds == newline).all(dim=-1)
    return found


# the small copy alone has so many
def _layout(pixels: Pixels) -> Tensor:
    return packed(pixels, vision_feature_select_strategy="default")


ADAPTER = Adapter(
    model_type="llava_next", family="LLaVA-NeXT", structural=newlines, tower=tower, fewest=patches, layout=_layout
)
