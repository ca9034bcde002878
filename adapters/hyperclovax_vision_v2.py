"""HyperCLOVA X SEED Think: Qwen2.5-VL's tower and merger, a linear layer after it, positions counted in one axis."""

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTER = Adapter(model_type="hyperclovax_vision_v2", family="HyperCLOVA X", modalities=(IMAGE, VIDEO), layout=merged)
