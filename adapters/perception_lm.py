"""Perception LM: the small copy of an image and its tiles follow one another in the prompt and share one budget.

Nothing stands between two images either, unless text does: such two share the budget of a single one. Videos go through
the images' method.
"""

from lp_patch.layout import tiles
from lp_patch.registry import IMAGE, Adapter, Modality

ADAPTER = Adapter(
    model_type="perception_lm",
    family="Perception LM",
    modalities=(IMAGE, Modality("video", "get_image_features", "video_token_id")),
    merge_adjacent=True,
    layout=tiles,
)
