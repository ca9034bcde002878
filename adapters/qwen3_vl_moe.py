"""Qwen3-VL with a mixture of experts: Qwen3-VL's structure around other decoder layers."""

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, VIDEO, Adapter

from .qwen3_vl import deepstack_layers

ADAPTER = Adapter(
    model_type="qwen3_vl_moe",
    family="Qwen3-VL-MoE",
    modalities=(IMAGE, VIDEO),
    first_cut=deepstack_layers,
    layout=merged,
)
