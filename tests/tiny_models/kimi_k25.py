"""Kimi K2.5: DeepSeek-V3's layers, dense and of experts, and pictures of any size; frames of a video, four by four."""

import torch
from transformers import Kimi_K25Config, Kimi_K25VisionConfig

from .common import END, IMAGE, START, VIDEO, Picture, Tiny, pixels, placeholders, text_config

PATCH = 4


def config():
    vision = Kimi_K25VisionConfig(
        patch_size=PATCH, pos_emb_height=8, pos_emb_width=8, num_attention_heads=2, num_hidden_layers=2, hidden_size=16,
        intermediate_size=24,
    )  # fmt: skip
    text = text_config(
        "deepseek_v3", num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=2, kv_lora_rank=16, q_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return Kimi_K25Config(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END, projection_hidden_size=16,
    )  # fmt: skip


def picture(generator, height=4, width=4, frames=0):
    """One of height x width tokens; with frames what becomes one of a video."""
    token, name, grid = (VIDEO, "pixel_values_videos", "video") if frames else (IMAGE, "pixel_values", "image")
    count = max(1, frames)
    shown = pixels(generator, count, 3, 2 * PATCH * height, 2 * PATCH * width)
    patches = shown.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    inputs = {name: patches, f"{grid}_grid_thw": torch.tensor([[count, 2 * height, 2 * width]])}
    return Picture(*placeholders(height * width, [START], [END], token), inputs)


TYPES = {
    "kimi_k25": Tiny(
        config, picture, rows=((3, (), 5), (2, (3, 5), 1, (3, 3, 4), 2, (3, 3, 2), (5, 2), 3), (6,))
    )
}  # fmt: skip
