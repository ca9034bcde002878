"""Qwen3.5, dense and with experts: three of four layers are linear attention; a video's frames have time stamps."""

from functools import partial

import torch
from transformers import AutoConfig

from .common import END, IMAGE, START, VIDEO, Picture, Tiny, pixels, text, text_config

PATCH, LAYERS = 4, 8
TEXT = {
    "num_hidden_layers": LAYERS,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}  # fmt: skip
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}


def config(model_type="qwen3_5", more=None):
    text = text_config(f"{model_type}_text", **TEXT, **(more or {}))
    vision = {
        "depth": 2, "num_heads": 2, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": text["hidden_size"],
        "patch_size": PATCH, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 64,
    }  # fmt: skip
    return AutoConfig.for_model(
        model_type, vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip


def merged_patches(generator, *size, patch=PATCH):
    """An image of h x w merged patches, or a video of t x h x w, two tokens of a time stamp between its frames."""
    t, h, w = (1, *size)[-3:]
    kind, token, name = ("image", IMAGE, "pixel_values") if t == 1 else ("video", VIDEO, "pixel_values_videos")
    ids, visual = [], []
    for frame in range(t):
        ids += [*(text(generator, 2) if frame else []), START]
        visual += range(len(ids), len(ids) + h * w)
        ids += [token] * (h * w) + [END]
    rows = pixels(generator, t * 4 * h * w, 1, 3 * 2 * patch, patch).flatten(1)
    return Picture(ids, visual, {name: rows, f"{kind}_grid_thw": torch.tensor([[t, 2 * h, 2 * w]])})


def remember(model):
    """Let the recurrent layers remember more than a token or two, as trained ones do."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data = torch.linspace(0.02, 0.5, parameter.numel(), dtype=parameter.dtype).log()


ROWS = ((3, (3, 4), 5), (2, (4, 3), 1, (2, 3, 3), 2, (3, 3), 3), (6,))
TYPES = {
    name: Tiny(
        partial(config, name, more), merged_patches, ROWS, typed="mm_token_type_ids", positions=False, adjust=remember,
        layer=4,
    )
    for name, more in (("qwen3_5", {}), ("qwen3_5_moe", MOE))
}  # fmt: skip
