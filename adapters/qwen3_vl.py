"""Qwen3-VL, with a mixture of experts or without: merged patches, and DeepStack.

DeepStack's features are added by the first decoder layers at the visual positions.
"""

from typing import Any

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, VIDEO, Adapter


def deepstack_layers(config: Any) -> int:
    """Feature i is added after decoder layer i (from 0): so many layers need the sequence that stage 1 left."""
    return max(1, len(config.vision_config.deepstack_visual_indexes))


ADAPTERS = tuple(
    Adapter(
        model_type=model_type,
        family=family,
        modalities=(IMAGE, VIDEO),
        first_cut=deepstack_layers,
        layout=merged,
    )
    for model_type, family in (("qwen3_vl", "Qwen3-VL"), ("qwen3_vl_moe", "Qwen3-VL-MoE"))
)
