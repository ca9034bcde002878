"""ERNIE 4.5 VL: a resampler merges 2 x 2 patches, of two frames in videos; visual tokens have experts of their own.

Which experts a token has stands in a row of ids that goes to every layer.
"""

from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTER = Adapter(
    model_type="ernie4_5_vl_moe",
    family="ERNIE 4.5 VL",
    modalities=(IMAGE, VIDEO),
    per_token=("moe_mm_token_type_ids",),
)
