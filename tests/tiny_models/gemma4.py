"""Gemma 4: images of any size as patches with their coordinates; windows; a bidirectional and two layered variants.

The unified type has no tower: a patch is as large as the others' pooled token. A video's frames have text between them.
"""

from functools import partial

import torch
from transformers import Gemma4Config, Gemma4UnifiedConfig, Gemma4UnifiedVisionConfig, Gemma4VisionConfig

from .common import END, IMAGE, START, VIDEO, VOCAB, Picture, Tiny, placeholders, text, text_config

POOL, PATCH, MOST = 2, 4, 12  # patches to a token's side, pixels to a patch's, tokens that an image is padded to
WINDOW, FULL = "sliding_attention", "full_attention"
ROWS = ((6, (3, 3), 14), (4, (2, 5), 3, (2, 2, 3), 9), (20,))


def given(kind, **more):
    more = {"layer_types": [WINDOW, FULL, WINDOW, WINDOW, FULL, FULL], "sliding_window": 8, **more}
    return {
        "text_config": text_config(kind, head_dim=8, global_head_dim=16, **more),
        "image_token_id": IMAGE, "video_token_id": VIDEO, "boi_token_id": START, "eoi_token_id": END,
    }  # fmt: skip


def config(**more):
    vision = Gemma4VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, patch_size=PATCH, pooling_kernel_size=POOL, position_embedding_size=16,
    )  # fmt: skip
    more = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCAB, **more}
    return Gemma4Config(vision_config=vision, **given("gemma4_text", **more))


def unified_config():
    vision = Gemma4UnifiedVisionConfig(
        patch_size=PATCH, pooling_kernel_size=POOL, mm_embed_dim=16, mm_posemb_size=16, output_proj_dims=16
    )
    return Gemma4UnifiedConfig(vision_config=vision, **given("gemma4_unified_text"))


def picture(generator, *size, pool=POOL):
    """Of h x w tokens, or t x h x w of a video; `pool`: patches to a token's side."""
    *frames, height, width = size
    count, patch = sum(frames) or 1, 3 * (PATCH * POOL // pool) ** 2
    grid = torch.cartesian_prod(torch.arange(pool * height), torch.arange(pool * width)).flip(1)
    values, places = torch.zeros(count, MOST * pool**2, patch), torch.full((count, MOST * pool**2, 2), -1)
    values[:, : len(grid)] = torch.rand(count, len(grid), patch, generator=generator)
    places[:, : len(grid)] = grid
    if not frames:
        inputs = {"pixel_values": values, "image_position_ids": places}
        return Picture(*placeholders(height * width, [START], [END]), inputs)
    ids, visual = [], []
    for _ in range(count):  # each behind its time
        frame, at = placeholders(height * width, [*text(generator, 2), START], [END], VIDEO)
        visual += [len(ids) + x for x in at]
        ids += frame
    inputs = {"pixel_values_videos": values, "video_position_ids": places}
    return Picture(ids, visual, {**inputs, "num_frames_per_video": torch.tensor([count])})


VISION = {  # also keys that are values, and experts
    "use_bidirectional_attention": "vision", "attention_k_eq_v": True, "num_global_key_value_heads": 1,
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24,
}  # fmt: skip
SHARED = {
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
    "layer_types": [WINDOW, FULL, WINDOW, FULL, WINDOW, FULL],
}  # fmt: skip
tiny = partial(Tiny, picture=picture, rows=ROWS, typed="mm_token_type_ids")
TYPES = {
    "gemma4": tiny(config),
    "gemma4:vision": tiny(partial(config, **VISION)),
    "gemma4:layered": tiny(partial(config, hidden_size_per_layer_input=8)),
    "gemma4:shared": tiny(partial(config, **SHARED), wipes=False),
    "gemma4_unified": tiny(unified_config, picture=partial(picture, pool=1)),
}
