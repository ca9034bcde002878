"""PaliGemma: pictures come first, and the whole prompt attends in both directions; a linear projector."""

from typing import Any

from lp_patch.adapters.llava import patches, tower
from lp_patch.layout import tiles
from lp_patch.registry import Adapter


def _width(config: Any) -> int:
    return config.vision_config.hidden_size


ADAPTER = Adapter(
    model_type="paligemma",
    family="PaliGemma",
    projector="multi_modal_projector",
    width=_width,
    tower=tower,
    fewest=patches,
    layout=tiles,
)
