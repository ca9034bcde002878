"""Janus: reads pictures like LLaVA. What it draws itself goes past the merging forward, and is not pruned."""

from operator import attrgetter
from typing import Any

from lp_patch.layout import tiles
from lp_patch.registry import Adapter


def _fewest(config: Any) -> int:
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


ADAPTER = Adapter(model_type="janus", family="Janus", tower=attrgetter("vision_model"), fewest=_fewest, layout=tiles)
