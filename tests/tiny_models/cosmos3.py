"""Cosmos 3: Omni, which is Qwen3-VL, and Edge. A time stamp stands before each frame of a video."""

from functools import partial

from transformers import Cosmos3EdgeConfig, Cosmos3OmniConfig

from .common import END, HIDDEN, IMAGE, START, VIDEO, Picture, Tiny, placeholders, text, text_config
from .glm4v import AXES, FILMS, PATCH, count, grid, vision

TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip


def omni():
    return Cosmos3OmniConfig(
        vision_config=vision(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        text_config=text_config("qwen3_vl_text", head_dim=8, rope_parameters=AXES), **TOKENS,
    )  # fmt: skip


def edge():
    tower = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": PATCH, "num_patches": 64,
    }  # fmt: skip
    return Cosmos3EdgeConfig(
        vision_config=tower, text_config=text_config("cosmos3_edge_text", head_dim=8, rope_parameters=AXES),
        projector_hidden_size=HIDDEN, **TOKENS,
    )  # fmt: skip


def picture(generator, height, width, frames=0, channels=3):
    ids, visual = [], []
    for _ in range(max(1, frames)):
        ids += text(generator, 2) if frames else []
        one, places = placeholders(height * width, [START], [END], VIDEO if frames else IMAGE)
        visual += [len(ids) + x for x in places]
        ids += one
    return Picture(ids, visual, grid(generator, height, width, frames, channels))


def tiny(config, channels):
    return Tiny(
        config,
        partial(picture, channels=channels),
        rows=FILMS,
        typed="mm_token_type_ids",
        positions=False,
        adjust=count,
    )


TYPES = {"cosmos3_omni": tiny(omni, 6), "cosmos3_edge": tiny(edge, 3)}
