"""Qwen3.5 and its mixture of experts: Qwen3-VL's tower without DeepStack; three of four layers are linear attention."""

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTERS = tuple(
    Adapter(model_type=model_type, family=family, modalities=(IMAGE, VIDEO), layout=merged)
    for model_type, family in (("qwen3_5", "Qwen3.5"), ("qwen3_5_moe", "Qwen3.5-MoE"))
)
