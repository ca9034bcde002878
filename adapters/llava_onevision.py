"""LLaVA-OneVision: images as in LLaVA-NeXT, but shrunk where they are large; a line break also ends a video."""

from torch import Tensor

from lp_patch.adapters.llava import tower
from lp_patch.adapters.llava_next import newlines
from lp_patch.layout import Pixels, packed, tiles
from lp_patch.registry import IMAGE, VIDEO, Adapter


def _layout(pixels: Pixels) -> Tensor:
    return tiles(pixels) if pixels.video else packed(pixels, vision_aspect_ratio=pixels.base.config.vision_aspect_ratio)


ADAPTER = Adapter(
    model_type="llava_onevision",
    family="LLaVA-OneVision",
    modalities=(IMAGE, VIDEO),
    structural=newlines,
    tower=tower,
    layout=_layout,
)
