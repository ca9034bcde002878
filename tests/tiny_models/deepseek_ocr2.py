"""DeepSeek-OCR 2: learnt queries read a SAM tower; pictures with tiles and without, experts in the decoder."""

import torch
from torch import nn
from transformers import DeepseekOcr2Config

from .common import HIDDEN, IMAGE, LAYERS, Picture, Tiny, pixels, placeholders, text_config

QUERIES, PATCH, WHOLE, TILE = 9, 4, 48, 32


def config():
    sam = {
        "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": WHOLE,
        "patch_size": PATCH, "window_size": 4, "global_attn_indexes": [1], "mlp_ratio": 2.0,
        "downsample_channels": [12, HIDDEN],
    }  # fmt: skip
    encoder = text_config("deepseek_ocr2_encoder", num_hidden_layers=2)
    text = text_config(
        "deepseek_ocr2_text", mlp_layer_types=["dense", *["sparse"] * (LAYERS - 1)], n_routed_experts=4,
        n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=24,
    )  # fmt: skip
    return DeepseekOcr2Config(
        vision_config={"sam_config": sam, "encoder_config": encoder}, text_config=text, image_token_id=IMAGE
    )


def few_queries(model):
    """Fewer than the 144 that the class has for pictures and tiles of this size."""
    tower = model.model.vision_tower
    tower.query_768_resolution = nn.Embedding(QUERIES, HIDDEN)
    with torch.no_grad():
        model.model.view_separator.normal_()
    return model


def picture(generator, tiles):
    """Tiles, the whole picture, and the separator."""
    count = QUERIES * (tiles + 1)
    ids, at = placeholders(count + 1)
    inputs = {
        "pixel_values": pixels(generator, 1, 3, WHOLE, WHOLE),
        "pixel_values_local": pixels(generator, tiles, 3, TILE, TILE) if tiles else torch.zeros(0, 3, TILE, TILE),
        "num_local_patches": torch.tensor([tiles]),
    }
    return Picture(ids, at[:count], inputs, structural=at[count:])


TYPES = {
    "deepseek_ocr2": Tiny(config, picture, rows=((3, (2,), 5), (2, (0,), (1,), 2, (0,), 3), (6,)), patch=few_queries)
}
