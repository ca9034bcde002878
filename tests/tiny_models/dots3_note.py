"""Dots3 Note: merged patches; an indexer picks keys in some layers, the others have a window and heads of their own."""

import torch
from transformers import AutoConfig

from .common import END, FIRST, HIDDEN, IMAGE, LAYERS, START, VIDEO, Picture, Tiny, placeholders, text_config

PATCH = 4
WINDOW, INDEXED = "sliding_attention", "indexed_attention"


def config():
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": PATCH, "adapter_in_dim": 16, "adapter_out_dim": HIDDEN,
        "pyramid_num_routed": [-1, -1],
    }  # fmt: skip
    audio = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "feature_size": 8,
        "downsample_hidden_size": 8, "adapter_input_size": 16, "adapter_out_dim": HIDDEN,
    }  # fmt: skip
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
    text = text_config(
        "dots3_note_text", num_key_value_heads=4, qk_rope_head_dim=8, sliding_window=8, moe_intermediate_size=24,
        n_routed_experts=4, num_experts_per_tok=2, shared_experts_intermediate_size=24, index_topk=12,
        index_head_dim=8, index_n_heads=16, layer_types=[WINDOW, INDEXED, WINDOW, WINDOW, INDEXED, WINDOW],
        mlp_layer_types=["dense", *["sparse"] * (LAYERS - 1)], swa_num_attention_heads=2, swa_num_key_value_heads=2,
        **heads, **{f"swa_{name}": x for name, x in heads.items()},
    )  # fmt: skip
    return AutoConfig.for_model(
        "dots3_note", vision_config=vision, audio_config=audio, text_config=text, image_token_id=IMAGE,
        video_token_id=VIDEO, audio_token_id=FIRST - 1,
    )  # fmt: skip


def picture(generator, *size):
    """An image of h x w merged patches, or a video of t x h x w."""
    t, h, w = (1, *size)[-3:]
    kind, token, name = ("image", IMAGE, "pixel_values") if t == 1 else ("video", VIDEO, "pixel_values_videos")
    values = torch.randn(t * 4 * h * w, 3 * PATCH**2, generator=generator)
    inputs = {name: values, f"{kind}_grid_thw": torch.tensor([[t, 2 * h, 2 * w]])}
    return Picture(*placeholders(t * h * w, [START], [END], token), inputs)


ROWS = ((6, (3, 4), 14), (4, (2, 5), 3, (2, 2, 3), 9), (20,))
TYPES = {"dots3_note": Tiny(config, picture, rows=ROWS, static=False)}
