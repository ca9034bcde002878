"""Qwen2.5-VL: the vision tower's merger works in window order, so stage 1 prunes what it hands to the prompt."""

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTER = Adapter(model_type="qwen2_5_vl", family="Qwen2.5-VL", modalities=(IMAGE, VIDEO), layout=merged)
