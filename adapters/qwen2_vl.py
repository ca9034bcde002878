"""Qwen2-VL: the merger joins 2 x 2 patches, so stage 1 prunes what it hands to the prompt."""

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTER = Adapter(model_type="qwen2_vl", family="Qwen2-VL", modalities=(IMAGE, VIDEO), layout=merged)
