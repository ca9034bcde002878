"""Granite Docling: pages of one tile, or of several and a thumbnail; DeepStack."""

import torch
from transformers import GraniteDoclingConfig

from .common import HIDDEN, IMAGE, PAD, START, Picture, Tiny, pixels, placeholders, text_config

FIRST_TILE, TILE, WHOLE, LINE = range(6, 10)
SIDE, PATCH = 24, 4
TOKENS = (SIDE // PATCH // 2) ** 2


def config():
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": PATCH, "scale_factor": 2, "out_hidden_size": HIDDEN,
        "deepstack_visual_indexes": [0, 1], "use_fine_route": True,
    }  # fmt: skip
    text = text_config("granite_docling_text", attention_multiplier=0.3, embedding_multiplier=2.0)
    return GraniteDoclingConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, pad_token_id=PAD)


def picture(generator, height, width):
    """A page of `height` x `width` tiles; START stands before each."""
    ids, visual = [], []

    def tile(*name):
        own, at = placeholders(TOKENS, before=(START, *name))
        visual.extend(len(ids) + x for x in at)
        ids.extend(own)

    for row in range(height):
        for column in range(width):
            tile(FIRST_TILE if row == column == 0 else TILE)
        ids.append(LINE)
    count = height * width
    if count > 1:
        ids.append(LINE)
        tile(WHOLE)
        ids.append(START)
        count += 1
    return Picture(ids, visual, {"pixel_values": pixels(generator, count, 3, SIDE, SIDE)})


def collate(rows):
    """Rows padded to the same number of tiles, and which tiles are real."""
    own = [torch.cat([torch.zeros(0, 3, SIDE, SIDE), *(p.inputs["pixel_values"] for p in row)]) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    real = [torch.ones(len(x), dtype=torch.bool) for x in own]
    return {"pixel_values": pad(own, batch_first=True), "pixel_attention_mask": pad(real, batch_first=True)}


TYPES = {
    "granite_docling": Tiny(
        config, picture, rows=((3, (1, 2), 5), (2, (1, 1), (1, 1), 2, (2, 1), 3), (6,)), collate=collate
    )
}
