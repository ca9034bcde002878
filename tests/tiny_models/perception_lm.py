"""Perception LM; its tower is of timm: CLIP's stands in, which also keeps [CLS] first."""

from transformers import CLIPVisionConfig, PerceptionLMConfig

from .common import IMAGE, VIDEO, Picture, Tiny, pixels, placeholders, text_config

SIDE, PATCH = 6, 4  # patches of a tile, and pixels of one
N = (SIDE // 2) ** 2  # tokens of a tile: pooled
TILES = 2  # with the small copy; of every image in a call as many


def config():
    # the projector asks for the width as timm's towers have it
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE * PATCH,
        patch_size=PATCH, model_args={"embed_dim": 16},
    )  # fmt: skip
    return PerceptionLMConfig(
        vision_config=vision, text_config=text_config("llama"), image_token_id=IMAGE, video_token_id=VIDEO,
        projector_pooling_ratio=2,
    )  # fmt: skip


def picture(generator):
    tiles = pixels(generator, 1, TILES, 3, SIDE * PATCH, SIDE * PATCH)
    return Picture(*placeholders(TILES * N), {"pixel_values": tiles})


def picture_or_video(generator, frames=0):
    if not frames:
        return picture(generator)
    shown = pixels(generator, 1, frames, 3, SIDE * PATCH, SIDE * PATCH)
    return Picture(*placeholders(frames * N, token=VIDEO), {"pixel_values_videos": shown})


ROWS = ((3, (), 5), (2, (), 1, (3,), 3), (6,))
TYPES = {"perception_lm": Tiny(config, picture_or_video, ROWS)}
