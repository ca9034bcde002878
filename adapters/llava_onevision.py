"""LLaVA-OneVision: images as in LLaVA-NeXT, but shrunk where they are large; a line break also ends a video."""

from lp_patch.adapters.llava import tower
from lp_patch.adapters.llava_next import newlines
from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTER = Adapter(
    model_type="llava_onevision",
    family="LLaVA-OneVision",
    modalities=(IMAGE, VIDEO),
    structural=newlines,
    tower=tower,
)
