"""Qianfan-OCR: tiles of one size, 2 x 2 patches joined, as many a picture as it needs."""

from transformers import QianfanOCRConfig, QianfanOCRVisionConfig

from .common import END, IMAGE, START, Picture, Tiny, pixels, placeholders, text_config

SIDE, PATCH = 6, 4  # patches of a tile, and pixels of one
N = (SIDE // 2) ** 2


def config():
    vision = QianfanOCRVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE * PATCH,
        patch_size=PATCH,
    )  # fmt: skip
    return QianfanOCRConfig(
        vision_config=vision, text_config=text_config("qwen3", head_dim=8), image_token_id=IMAGE, image_seq_length=N
    )


def picture(generator, tiles=1):
    shown = pixels(generator, tiles, 3, SIDE * PATCH, SIDE * PATCH)
    return Picture(*placeholders(tiles * N, [START], [END]), {"pixel_values": shown})


TYPES = {"qianfan_ocr": Tiny(config, picture, rows=((3, (), 5), (2, (3,), (), 3), (6,)))}
