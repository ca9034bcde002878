"""DeepSeek-VL, and the hybrid, whose second tower sees the same picture in more pixels."""

import torch
from transformers import DeepseekVLConfig, DeepseekVLHybridConfig, SamVisionConfig, SiglipVisionConfig

from .common import IMAGE, Picture, Tiny, pixels, placeholders, text_config

SIDE, PATCH = 4, 7  # patches, and pixels of one
FINE = 64  # pixels that the second tower sees


def parts():
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE * PATCH,
        patch_size=PATCH,
    )  # fmt: skip
    return {"vision_config": vision, "text_config": text_config("llama"), "image_token_id": IMAGE}


def config():
    return DeepseekVLConfig(**parts())


def hybrid_config():
    fine = SamVisionConfig(
        hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=FINE, patch_size=8,
        window_size=4, global_attn_indexes=[1], mlp_dim=24,
    )  # fmt: skip
    return DeepseekVLHybridConfig(**parts(), high_res_vision_config=fine)


def picture(generator):
    shown = pixels(generator, 1, 3, SIDE * PATCH, SIDE * PATCH)
    return Picture(*placeholders(SIDE * SIDE), {"pixel_values": shown})


def hybrid_picture(generator):
    shown = picture(generator)
    fine = torch.nn.functional.interpolate(shown.inputs["pixel_values"], size=(FINE, FINE), mode="bilinear")
    shown.inputs["high_res_pixel_values"] = fine
    return shown


TYPES = {"deepseek_vl": Tiny(config, picture), "deepseek_vl_hybrid": Tiny(hybrid_config, hybrid_picture)}
