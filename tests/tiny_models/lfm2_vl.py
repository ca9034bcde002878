"""LFM2-VL: short convolutions and full attention; images of any size, or tiles of 3 x 3 tokens and a thumbnail."""

import torch
from torch.nn.functional import pad
from transformers import Lfm2VlConfig, Siglip2VisionConfig

from .common import END, IMAGE, START, Picture, Tiny, pixels, text_config

TILE, THUMBNAIL = 6, 7
PATCH, FACTOR, MOST = 4, 2, 64
TYPES_OF_LAYERS = [{"c": "conv", "f": "full_attention"}[x] for x in "ccfccfcf"]


def config():
    vision = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=PATCH,
        num_patches=36, vision_use_head=False,
    )  # fmt: skip
    text = text_config(
        "lfm2", num_hidden_layers=len(TYPES_OF_LAYERS), layer_types=TYPES_OF_LAYERS, block_multiple_of=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Lfm2VlConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, downsample_factor=FACTOR,
        projector_hidden_size=24, tie_word_embeddings=False,
    )  # fmt: skip


def picture(generator, height, width, tiles=0):
    """height x width tokens; the thumbnail of so many tiles, if any."""
    ids, visual, patches, shapes = [START], [], [], []
    for number, (h, w) in enumerate([(3, 3)] * tiles + [(height, width)]):
        if tiles:
            ids.append(TILE if number < tiles else THUMBNAIL)
        visual += range(len(ids), len(ids) + h * w)
        ids += [IMAGE] * (h * w)
        shapes.append([FACTOR * h, FACTOR * w])
        rows = pixels(generator, FACTOR * h * FACTOR * w, 3, PATCH, PATCH).flatten(1)
        patches.append(pad(rows, (0, 0, 0, MOST - len(rows))))
    shapes = torch.tensor(shapes)
    mask = (torch.arange(MOST) < shapes.prod(-1)[:, None]).int()
    inputs = {"pixel_values": torch.stack(patches), "spatial_shapes": shapes, "pixel_attention_mask": mask}
    return Picture([*ids, END], visual, inputs)


TYPES = {"lfm2_vl": Tiny(config, picture, ((3, (3, 4), 5), (2, (2, 4, 2), (4, 3), 1, (2, 5), 3), (6,)), layer=3)}
