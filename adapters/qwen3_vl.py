"""Qwen3-VL: merged patches, and DeepStack features that the first decoder layers add at the visual positions."""

from typing import Any

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, VIDEO, Adapter


def deepstack_layers(config: Any) -> int:
    """Feature i is added after decoder layer i (from 0): so many layers need the sequence that stage 1 left."""
    return max(1, len(config.vision_config.deepstack_visual_indexes))


ADAPTER = Adapter(
    model_type="qwen3_vl",
    family="Qwen3-VL",
    modalities=(IMAGE, VIDEO),
    first_cut=deepstack_layers,
    layout=merged,
)
