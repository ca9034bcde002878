"""Molmo 2: a small view of the image, then its crops, in rows; features are added; all pictures see one another."""

from functools import partial

import torch
from transformers import Molmo2AdapterConfig, Molmo2Config, Molmo2VisionConfig

from .common import END, FIRST, HIDDEN, IMAGE, START, Picture, Tiny, text, text_config

SIDE, PATCH = 4, 4  # patches of a crop, of which 2 x 2 make a token; pixels
LOW, LINE = FIRST - 2, FIRST - 1


def config():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    vision = Molmo2VisionConfig(
        intermediate_size=24, num_hidden_layers=3, image_size=[SIDE * PATCH] * 2, patch_size=PATCH, **sizes
    )
    adapter = Molmo2AdapterConfig(intermediate_size=24, vision_feature_layer=[2, 0], text_hidden_size=HIDDEN, **sizes)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    words = text_config(
        "molmo2_text", head_dim=8, additional_vocab_size=4, rope_parameters=rope, rope_scaling_layers=[1, 3, 4]
    )
    return Molmo2Config(
        vision_config=vision, adapter_config=adapter, text_config=words, image_patch_id=IMAGE,
        image_start_token_id=START, image_end_token_id=END, low_res_image_start_token_id=LOW,
        frame_start_token_id=START, frame_end_token_id=END,
    )  # fmt: skip


def view(high, wide, first):
    """Crops whose patches are numbered from `first`: (tokens, 4), what each is pooled from, and (rows, columns)."""
    patches = first + torch.arange(high * wide * SIDE**2).view(high, wide, SIDE, SIDE).transpose(1, 2)
    pooled = patches.reshape(high * SIDE // 2, 2, wide * SIDE // 2, 2).transpose(1, 2)
    return pooled.reshape(-1, 4), (high * SIDE // 2, wide * SIDE // 2)


def picture(generator, high, wide):
    small, (rows, columns) = view(1, 1, 0)
    large, (more, broad) = view(high, wide, SIDE**2)
    ids = [LOW, *[*[IMAGE] * columns, LINE] * rows, END, START, *[*[IMAGE] * broad, LINE] * more, END]
    return Picture(
        ids,
        [i for i, x in enumerate(ids) if x == IMAGE],
        {
            "pixel_values": torch.randn(1 + high * wide, SIDE**2, 3 * PATCH**2, generator=generator),
            "image_token_pooling": torch.cat([small, large]),
            "image_grids": torch.tensor([[rows, columns, more, broad]]),
        },
    )


def video(generator, frames):
    ids = [x for _ in range(frames) for x in [*text(generator, 2), START, *[IMAGE] * (SIDE // 2) ** 2, END]]
    return Picture(
        ids,
        [i for i, x in enumerate(ids) if x == IMAGE],
        {
            "pixel_values_videos": torch.randn(frames, SIDE**2, 3 * PATCH**2, generator=generator),
            "video_token_pooling": torch.cat([view(1, 1, SIDE**2 * i)[0] for i in range(frames)]),
            "video_grids": torch.tensor([[frames, SIDE // 2, SIDE // 2]]),
        },
    )


def collate(rows):
    """Patches are numbered through the batch."""
    found, patches = {}, 0
    for one in [picture for row in rows for picture in row]:
        for name, value in one.inputs.items():
            value = value + patches if name.endswith("pooling") else value
            found.setdefault(name, []).append(value)
        patches += next(x for name, x in one.inputs.items() if name.startswith("pixel")).shape[:2].numel()
    return {name: torch.cat(values) for name, values in found.items()}


# not of placeholders alone
TYPED = dict.fromkeys((IMAGE, LOW, LINE, START, END), 1)
tiny = partial(Tiny, config, typed="mm_token_type_ids", types=TYPED, collate=collate)
TYPES = {
    "molmo2": tiny(picture, rows=((6, (1, 2), 14), (4, (2, 2), 3, (2, 1), 9), (20,))),
    "molmo2:video": tiny(video, rows=((6, (3,), 14), (4, (5,), 9), (20,))),  # one in a prompt, as the processor has it
}
