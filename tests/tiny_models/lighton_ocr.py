"""LightOnOCR: pages of any size, padded to one in pixels but not in tokens."""

import torch
from transformers import LightOnOcrConfig, PixtralVisionConfig

from .common import IMAGE, Picture, Tiny, pixels, placeholders, text_config

PATCH = 4


def config():
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8, patch_size=PATCH,
        image_size=64,
    )  # fmt: skip
    return LightOnOcrConfig(vision_config=vision, text_config=text_config("qwen3", head_dim=8), image_token_id=IMAGE)


def picture(generator, height=4, width=4):
    """A page of height x width tokens."""
    size = (2 * PATCH * height, 2 * PATCH * width)
    return Picture(*placeholders(height * width), {"pixel_values": pixels(generator, 1, 3, *size)})


def collate(rows):
    pages = [x.inputs["pixel_values"][0] for row in rows for x in row]
    sizes = torch.tensor([x.shape[1:] for x in pages])
    shown = torch.zeros(len(pages), 3, *sizes.amax(dim=0).tolist())
    for i, page in enumerate(pages):
        shown[i, :, : page.shape[1], : page.shape[2]] = page
    return {"pixel_values": shown, "image_sizes": sizes}


TYPES = {
    "lighton_ocr": Tiny(config, picture, rows=((3, (), 5), (2, (3, 5), (5, 2), 1, (), 3), (6,)), collate=collate)
}  # fmt: skip
