"""LFM2-VL: tiles of an image and its thumbnail, a tag before each, share one budget; most layers are convolutions."""

import torch
from torch import Tensor

from lp_patch.layout import Pixels, join
from lp_patch.registry import Adapter


def split_images(ids: Tensor, positions: Tensor) -> list[int]:
    """Ids (S,) and visual positions (n,) of a row -> tokens of each of its images.

    No more than a tag parts tiles. Two tokens at least part images: the end of one and the start of the next.
    """
    runs = positions.tensor_split((positions.diff() > 2).nonzero().flatten() + 1)
    return [len(run) for run in runs]


def _layout(pixels: Pixels) -> Tensor:
    sizes = [(int(h), int(w)) for h, w in pixels.inputs["spatial_shapes"].tolist()]
    patches = [x[: h * w] for x, (h, w) in zip(pixels.main, sizes, strict=True)]
    return join(torch.cat(patches), sizes, pixels.count)


ADAPTER = Adapter(model_type="lfm2_vl", family="LFM2-VL", split=split_images, layout=_layout)
