"""Idefics2: pictures of any size through a perceiver, whole or in five tiles; a row's pictures share a tensor."""

from functools import partial

import torch
from transformers import Idefics2Config

from .common import IMAGE, START, Picture, Tiny, pixels, placeholders, text_config

LATENTS, PATCH, SIDE = 9, 4, 16


def config(window=None):
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    perceiver = {
        "resampler_n_latents": LATENTS, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8,
        "num_key_value_heads": 1, "hidden_size": 32,
    }  # fmt: skip
    return Idefics2Config(
        vision_config=vision, perceiver_config=perceiver, text_config=text_config("mistral", sliding_window=window),
        image_token_id=IMAGE,
    )  # fmt: skip


def picture(generator, tiles, height=SIDE, width=SIDE, follows=False):
    """One of `tiles` tiles; START is the boundary token, and one of them parts pictures that follow each other."""
    ids, visual = [] if follows else [START], []
    for _ in range(tiles):
        own, at = placeholders(LATENTS, after=(START,))
        visual += [len(ids) + x for x in at]
        ids += own
    values = torch.zeros(tiles, 3, SIDE, SIDE)
    mask = torch.zeros(tiles, SIDE, SIDE, dtype=torch.long)
    values[:, :, :height, :width] = pixels(generator, tiles, 3, height, width)
    mask[:, :height, :width] = 1
    return Picture(ids, visual, {"pixel_values": values, "pixel_attention_mask": mask})


def collate(rows):
    """Rows padded to the same number of tiles with black ones."""
    most = max(sum(len(p.inputs["pixel_values"]) for p in row) for row in rows)

    def stack(name, empty):
        own = [torch.cat([empty, *(p.inputs[name] for p in row)])[-most:] for row in rows]
        return torch.stack([torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in own])

    return {
        "pixel_values": stack("pixel_values", torch.zeros(0, 3, SIDE, SIDE)),
        "pixel_attention_mask": stack("pixel_attention_mask", torch.zeros(0, SIDE, SIDE, dtype=torch.long)),
    }


ROWS = ((3, (5,), 5), (2, (1, 16, 8), (1, 8, 12, True), 1, (1,), 3), (6,))
TYPES = {
    "idefics2": Tiny(config, picture, ROWS, collate=collate),
    "idefics2:window": Tiny(partial(config, 8), picture, ROWS, collate=collate, static=False),
}
