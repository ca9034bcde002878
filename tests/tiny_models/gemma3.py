"""Gemma 3: pooled SigLIP features, so many an image; layers with a window; an image's tokens see one another."""

from transformers import Gemma3Config, SiglipVisionConfig

from .common import END, IMAGE, START, Picture, Tiny, pixels, placeholders, text_config

SIDE, PATCH = 8, 4  # patches, of which 2 x 2 make a token
WINDOW, FULL = "sliding_attention", "full_attention"
ROWS = ((6, (), 14), (4, (), 3, (), 9), (20,))  # text reaches beyond the window, images too


def config():
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=PATCH,
        image_size=SIDE * PATCH,
    )  # fmt: skip
    text = text_config(
        "gemma3_text", head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
        layer_types=[WINDOW, FULL, WINDOW, WINDOW, FULL, WINDOW],
    )  # fmt: skip
    return Gemma3Config(
        vision_config=vision, text_config=text, mm_tokens_per_image=(SIDE // 2) ** 2, image_token_index=IMAGE,
        boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip


def picture(generator):
    ids = placeholders((SIDE // 2) ** 2, [START], [END])
    return Picture(*ids, {"pixel_values": pixels(generator, 1, 3, SIDE * PATCH, SIDE * PATCH)})


TYPES = {"gemma3": Tiny(config, picture, rows=ROWS, typed="token_type_ids")}
