"""Aria: learnt queries read the tower, so many a crop; crops of an image follow one another and share one budget."""

from operator import attrgetter
from typing import Any

from lp_patch.registry import Adapter


def _fewest(config: Any) -> int:
    return min(config.projector_patch_to_query_dict.values())


ADAPTER = Adapter(
    model_type="aria", family="Aria", merge_adjacent=True, tower=attrgetter("vision_tower"), fewest=_fewest
)
