"""ViP-LLaVA: CLIP features of several layers, concatenated."""

from transformers import CLIPVisionConfig, VipLlavaConfig

from .common import IMAGE, Picture, Tiny, pixels, placeholders, text_config

SIDE = 4  # patches


def config():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=14 * SIDE,
        patch_size=14, projection_dim=16,
    )  # fmt: skip
    return VipLlavaConfig(
        vision_config=vision, text_config=text_config("llama"), image_token_index=IMAGE, image_seq_length=SIDE * SIDE,
        vision_feature_layer=[-2, 1],
    )  # fmt: skip


def picture(generator):
    return Picture(*placeholders(SIDE * SIDE), {"pixel_values": pixels(generator, 1, 3, 14 * SIDE, 14 * SIDE)})


TYPES = {"vipllava": Tiny(config, picture)}
