"""Ovis2: a small copy of the image and its tiles, behind indicator tokens that have features of their own."""

from transformers import Ovis2Config, Ovis2VisionConfig

from .common import END, HIDDEN, IMAGE, START, VOCAB, Picture, Tiny, pixels, text_config

SIDE, PATCH = 6, 4  # patches of a tile, and pixels of one
GRID, COLUMN, ROW = 6, 7, 8
N = (SIDE // 2) ** 2  # tokens of a tile: 2 x 2 patches are joined


def config():
    vision = Ovis2VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE * PATCH,
        patch_size=PATCH, vocab_size=40, hidden_stride=2,
    )  # fmt: skip
    return Ovis2Config(
        vision_config=vision, text_config=text_config("qwen2"), image_token_id=IMAGE, hidden_size=HIDDEN,
        visual_indicator_token_ids=[START, GRID, COLUMN, ROW, END], vocab_size=VOCAB,
    )  # fmt: skip


def picture(generator, rows=1, columns=1):
    tile = [IMAGE] * N
    ids, tiles = [START, *tile, GRID, END], 1
    if rows * columns > 1:
        ids[-1:] = [*[*tile, COLUMN] * (columns - 1), *tile, ROW] * rows
        ids[-1] = END
        tiles += rows * columns
    visual = [i for i, x in enumerate(ids) if x == IMAGE]
    return Picture(ids, visual, {"pixel_values": pixels(generator, tiles, 3, SIDE * PATCH, SIDE * PATCH)})


TYPES = {"ovis2": Tiny(config, picture, rows=((3, (), 5), (2, (2, 2), (), 1, (1, 2), 3), (6,)))}
