"""Video-LLaVA: one tower for images, one for videos, whose frames follow one another in the prompt.

Frames keep their [CLS], which counts like any other token. Two videos without a token between them cannot be told
from one: they share the budget of a single one.
"""

from lp_patch.adapters.llava import patches
from lp_patch.layout import tiles
from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTER = Adapter(
    model_type="video_llava",
    family="Video-LLaVA",
    modalities=(IMAGE, VIDEO),
    merge_adjacent=("video",),
    fewest=patches,
    layout=tiles,
)
