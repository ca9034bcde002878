"""North Micro Vision: Qwen3-VL's tower and DeepStack; some layers may have a window, each kind its own positions."""

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, VIDEO, Adapter

from .qwen3_vl import deepstack_layers

ADAPTER = Adapter(
    model_type="cohere_compass",
    family="North Micro Vision",
    modalities=(IMAGE, VIDEO),
    first_cut=deepstack_layers,
    layout=merged,
)
