"""Aria: crops of one size, padded, of which the projector's queries make so many tokens each."""

import torch
from transformers import AriaConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

from .common import END, IMAGE, START, Picture, Tiny, pixels, placeholders, text_config

SIDE, PATCH = 6, 4  # patches of a crop, and pixels of one
N = 12  # queries


def config():
    vision = Idefics3VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE * PATCH,
        patch_size=PATCH,
    )  # fmt: skip
    text = text_config("aria_text", intermediate_size=16, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    return AriaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, projector_patch_to_query_dict={SIDE * SIDE: N}
    )


def picture(generator, crops=1, height=SIDE):
    """Crops of which `height` rows of patches are no padding."""
    shown = pixels(generator, crops, 3, SIDE * PATCH, SIDE * PATCH)
    seen = torch.zeros(crops, SIDE * PATCH, SIDE * PATCH, dtype=torch.bool)
    seen[:, : height * PATCH] = True
    return Picture(
        *placeholders(crops * N, [START], [END]), {"pixel_values": shown * seen[:, None], "pixel_mask": seen}
    )


TYPES = {"aria": Tiny(config, picture, rows=((3, (), 5), (2, (2,), (1, 4), 1, (), 3), (6,)))}
