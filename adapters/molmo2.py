"""Molmo 2: a small view of the image and its crops are one feature, added to the placeholders' embeddings.

All pictures of a prompt see one another in both directions. Line breaks are text to the model. Images and videos have
the same placeholder: a call shows only one of both.
"""

from operator import attrgetter

import torch
from torch import Tensor

from lp_patch.layout import Pixels
from lp_patch.registry import IMAGE, VIDEO, Adapter


def _layout(pixels: Pixels) -> Tensor:
    """Which patches, of all of the call, a token pools: -1 is none."""
    pooled = pixels.inputs["video_token_pooling" if pixels.video else "image_token_pooling"]
    patches = pixels.main.flatten(0, -2)
    found = patches[pooled.clamp(min=0)]
    return found.masked_fill((pooled < 0)[..., None], torch.nan).flatten(1)


ADAPTER = Adapter(
    model_type="molmo2",
    family="Molmo 2",
    modalities=(IMAGE, VIDEO),
    tower=attrgetter("vision_tower"),
    layout=_layout,
)
