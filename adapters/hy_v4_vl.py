"""Hunyuan 4 VL: merged patches, each row ended by a learnt line break; an indexer picks keys for several layers.

Frames of a video follow one another and share its budget.
"""

from typing import Any

from torch import Tensor

from lp_patch.layout import rows_of_patches
from lp_patch.registry import IMAGE, VIDEO, Adapter


def line_breaks(base: Any, embeds: Tensor) -> Tensor:
    """Rows of embeds (B, S, D) that are the learnt line break: (B, S) bool."""
    return (embeds == base.vision_tower.patch_merger.image_newline.to(embeds)).all(dim=-1)


ADAPTER = Adapter(
    model_type="hy_v4_vl",
    family="Hunyuan 4 VL",
    modalities=(IMAGE, VIDEO),
    structural=line_breaks,
    layout=rows_of_patches,
)
