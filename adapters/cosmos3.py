"""Cosmos 3: the Omni reasoner is Qwen3-VL, DeepStack included; Edge has SigLIP 2 and a merger, and no DeepStack.

A time stamp stands before each frame of a video; they share one budget.
"""

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, VIDEO, Adapter

from .qwen3_vl import deepstack_layers

ADAPTERS = (
    Adapter(
        model_type="cosmos3_omni",
        family="Cosmos 3 Omni",
        modalities=(IMAGE, VIDEO),
        first_cut=deepstack_layers,
        layout=merged,
    ),
    Adapter(model_type="cosmos3_edge", family="Cosmos 3 Edge", modalities=(IMAGE, VIDEO), layout=merged),
)
