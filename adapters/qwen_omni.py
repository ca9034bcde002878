"""Qwen2.5-Omni and Qwen3-Omni: their thinker, which sees as Qwen-VL does. Sound is kept, and asks like text.

With its sound a video stands in pieces between pieces of sound: still one video with one budget.
"""

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, VIDEO, Adapter

from .qwen3_vl import deepstack_layers

ADAPTERS = (
    Adapter(model_type="qwen2_5_omni_thinker", family="Qwen2.5-Omni", modalities=(IMAGE, VIDEO), layout=merged),
    Adapter(
        model_type="qwen3_omni_moe_thinker",
        family="Qwen3-Omni",
        modalities=(IMAGE, VIDEO),
        first_cut=deepstack_layers,
        layout=merged,
    ),
)
