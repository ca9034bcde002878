"""Emu3: pictures of any size as codes of a VQ-VAE, which lie behind the ids that are said."""

import torch
from transformers import Emu3Config

from .common import END, FIRST, IMAGE, START, VOCAB, Picture, Tiny, pixels, text, text_config

LINE, CODES, FACTOR, SIDE = 6, 64, 2, 10


def config():
    names = {f"<|visual token {code:06d}|>": VOCAB + code for code in range(CODES)}
    vision = {
        "codebook_size": CODES, "embed_dim": 8, "latent_channels": 8, "temporal_downsample_factor": 1,
        "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [1],
        "hidden_size": 32, "num_attention_heads": 2,
    }  # fmt: skip
    return Emu3Config(
        vq_config=vision, text_config=text_config("emu3_text_model", vocab_size=VOCAB + CODES, attention_dropout=0.0),
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": LINE, **names},
    )  # fmt: skip


def picture(generator, height, width):
    """`height` x `width` codes, each row with its line break, behind the picture's size."""
    ids = [START, *text(generator, 3)]
    visual, structural = [], []
    for _ in range(height):
        visual += range(len(ids), len(ids) + width)
        structural.append(len(ids) + width)
        ids += [IMAGE] * (width + 1)
    # all are padded to one size, as in a batch: the VQ-VAE sees the padding, so another one gives other codes
    values = torch.zeros(1, 3, SIDE, SIDE)
    values[:, :, : FACTOR * height, : FACTOR * width] = pixels(generator, 1, 3, FACTOR * height, FACTOR * width)
    inputs = {"pixel_values": values, "image_sizes": torch.tensor([[FACTOR * height, FACTOR * width]])}
    return Picture([*ids, END], visual, inputs, structural)


def say_no_codes(model):
    """A picture is not an answer here."""
    model.generation_config.suppress_tokens = [*range(FIRST), *range(VOCAB, VOCAB + CODES)]


TYPES = {"emu3": Tiny(config, picture, rows=((3, (4, 4), 5), (2, (3, 5), (2, 4), 3), (6,)), adjust=say_no_codes)}
