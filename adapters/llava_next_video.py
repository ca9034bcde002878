"""LLaVA-NeXT-Video: images as in LLaVA-NeXT; the frames of a video are pooled before the projector."""

from lp_patch.adapters.llava import tower
from lp_patch.adapters.llava_next import newlines
from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTER = Adapter(
    model_type="llava_next_video",
    family="LLaVA-NeXT-Video",
    modalities=(IMAGE, VIDEO),
    structural=newlines,
    tower=tower,
)
