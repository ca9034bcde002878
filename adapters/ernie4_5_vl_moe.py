"""ERNIE 4.5 VL: a resampler merges 2 x 2 patches, of two frames in videos; visual tokens have experts of their own.

Which experts a token has stands in a row of ids that goes to every layer.
"""

import torch
from torch import Tensor

from lp_patch.layout import Pixels, merged
from lp_patch.registry import IMAGE, VIDEO, Adapter


def _layout(pixels: Pixels) -> Tensor:
    """Four patches that follow one another, of two frames in videos."""
    if not pixels.video:
        return merged(pixels)
    sizes = [(int(t), int(h) * int(w)) for t, h, w in pixels.about("grid_thw").tolist()]
    clips = pixels.main.flatten(1).split([t * n for t, n in sizes])
    side = 4 * pixels.main[0].numel()
    pairs = [x.reshape(t // 2, 2, -1, side).transpose(1, 2).flatten(2) for x, (t, _) in zip(clips, sizes, strict=True)]
    return torch.cat([x.flatten(0, 1) for x in pairs])


ADAPTER = Adapter(
    model_type="ernie4_5_vl_moe",
    family="ERNIE 4.5 VL",
    modalities=(IMAGE, VIDEO),
    per_token=("moe_mm_token_type_ids",),
    layout=_layout,
)
