"""FastVLM; its tower is of timm: a ResNet stands in, which also hands over a map (B, C, H, W)."""

from transformers import FastVlmConfig, ResNetConfig

from .common import IMAGE, Picture, Tiny, pixels, placeholders, text_config

SIDE, SHRINKS = 4, 8  # tokens, and pixels of one


def config():
    # the projector asks for the width as timm's towers have it
    vision = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", hidden_size=16)
    return FastVlmConfig(vision_config=vision, text_config=text_config("qwen2"), image_token_index=IMAGE)


def picture(generator):
    shown = pixels(generator, 1, 3, SHRINKS * SIDE, SHRINKS * SIDE)
    return Picture(*placeholders(SIDE * SIDE), {"pixel_values": shown})


def with_tower(model):
    model.model.vision_tower._supports_sdpa = True  # it has no attention, and minds that it is asked for one
    return model


TYPES = {"fast_vlm": Tiny(config, picture, patch=with_tower)}
