"""Step 3.7: crops of an image in front of the whole; experts; layers with a window have their own heads and rotary."""

import torch
from transformers import Step3p7Config, Step3p7TextConfig, Step3p7VisionConfig

from .common import END, FIRST, IMAGE, START, Picture, Tiny, pixels, text_config

PATCH = 4
WHOLE, CROP = 3, 2  # tokens to a side, each convolved from 4 x 4 patches
OPEN, CLOSE, LINE = range(FIRST - 3, FIRST)
WINDOW, FULL = "sliding_attention", "full_attention"


def config():
    vision = Step3p7VisionConfig(
        hidden_size=16, mlp_ratio=1.5, num_hidden_layers=2, num_attention_heads=2, image_size=4 * WHOLE * PATCH,
        patch_size=PATCH, max_position_embeddings=(4 * WHOLE) ** 2,
    )  # fmt: skip
    types = [WINDOW, FULL, WINDOW, WINDOW, FULL, WINDOW]
    text = text_config(
        "step3p5", head_dim=8, sliding_window=8, layer_types=types, num_sliding_attention_heads=2, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=24, share_expert_dim=24,
        mlp_layer_types=["dense", *["sparse"] * 5],
        rope_theta=[1e4 if x == WINDOW else 1e6 for x in types],
        partial_rotary_factors=[1.0 if x == WINDOW else 0.5 for x in types],
    )  # fmt: skip
    return Step3p7Config(vision_config=vision, text_config=Step3p7TextConfig(**text), image_token_id=IMAGE)


def picture(generator, rows=0, columns=0):
    """With so many crops."""
    ids = []
    for row in range(rows):
        ids += [OPEN, *[IMAGE] * CROP**2, CLOSE] * columns
        ids += [LINE] if row < rows - 1 else []
    ids += [START, *[IMAGE] * WHOLE**2, END]
    side, crop = 4 * WHOLE * PATCH, 4 * CROP * PATCH
    inputs = {
        "pixel_values": pixels(generator, 1, 3, side, side),
        "num_local_patches": torch.tensor([rows * columns]),
    }
    if rows:
        inputs["pixel_values_local"] = pixels(generator, rows * columns, 3, crop, crop)
    return Picture(ids, [i for i, x in enumerate(ids) if x == IMAGE], inputs)


TYPES = {"step3p7": Tiny(config, picture, rows=((6, (2, 1), 14), (4, (), 3, (1, 2), 9), (20,)))}
