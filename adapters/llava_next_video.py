"""LLaVA-NeXT-Video: images as in LLaVA-NeXT; the frames of a video are pooled before the projector."""

from torch import Tensor

from lp_patch.adapters.llava import tower
from lp_patch.adapters.llava_next import newlines
from lp_patch.layout import Pixels, packed, tiles
from lp_patch.registry import IMAGE, VIDEO, Adapter


def _layout(pixels: Pixels) -> Tensor:
    return tiles(pixels) if pixels.video else packed(pixels, vision_feature_select_strategy="default")


ADAPTER = Adapter(
    model_type="llava_next_video",
    family="LLaVA-NeXT-Video",
    modalities=(IMAGE, VIDEO),
    structural=newlines,
    tower=tower,
    layout=_layout,
)
