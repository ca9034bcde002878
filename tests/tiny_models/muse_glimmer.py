"""Muse: merged patches of images of any size, a video's frames behind their times; Spark has experts, and hears.

Every fourth layer, counted from the last, sees all and is given no rotary embedding.
"""

from functools import partial

import torch
from transformers import (
    MuseGlimmerConfig,
    MuseGlimmerVisionConfig,
    MuseSparkAudioConfig,
    MuseSparkConfig,
    MuseSparkVisionConfig,
)

from .common import END, FIRST, HIDDEN, IMAGE, START, VIDEO, Picture, Tiny, placeholders, text, text_config

PATCH = 4
BREAK = FIRST - 1


def given(vision_config, text_type, **more):
    vision = vision_config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, patch_size=PATCH,
        pos_emb_height=4, pos_emb_width=4,
    )  # fmt: skip
    words = text_config(text_type, head_dim=8, sliding_window=8, output_multiplier=1.0, **more)
    return {
        "vision_config": vision, "text_config": words,
        "image_token_id": IMAGE, "video_token_id": VIDEO, "out_hidden_size": 64, "projector_hidden_size": 24,
    }  # fmt: skip


def config():
    return MuseGlimmerConfig(**given(MuseGlimmerVisionConfig, "muse_glimmer_text"))


def spark_config():
    audio = MuseSparkAudioConfig(
        patch_sizes=[4, 2], hidden_sizes=[8, 16], depths=[1, 1], num_hidden_layers=2, out_hidden_size=HIDDEN
    )
    more = given(
        MuseSparkVisionConfig, "muse_spark_text", moe_intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
        moe_hidden_size=16, mlp_layer_types=["dense", *["sparse"] * 5],
    )  # fmt: skip
    return MuseSparkConfig(audio_config=audio, audio_token_id=FIRST - 2, **more)


def picture(generator, *size):
    """Of h x w merged patches, or t x h x w of a video."""
    *frames, height, width = size
    t = sum(frames) or 1
    values = torch.randn(t * 4 * height * width, 3 * 2 * PATCH**2, generator=generator)
    grid = torch.tensor([[t, 2 * height, 2 * width]])
    if not frames:
        inputs = {"pixel_values": values, "image_grid_thw": grid}
        return Picture(*placeholders(height * width, [START], [END]), inputs)
    ids, visual = [START], []
    for number in range(t):
        end = END if number == t - 1 else BREAK
        frame, at = placeholders(height * width, text(generator, 2), [end], VIDEO)
        visual += [len(ids) + x for x in at]
        ids += frame
    return Picture(ids, visual, {"pixel_values_videos": values, "video_grid_thw": grid})


tiny = partial(Tiny, picture=picture, rows=((6, (3, 4), 14), (4, (2, 5), 3, (2, 2, 3), 9), (20,)))
TYPES = {"muse_glimmer": tiny(config), "muse_spark": tiny(spark_config)}
