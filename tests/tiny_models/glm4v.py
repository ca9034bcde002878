"""GLM-4.1V and what follows it: Qwen2-VL's grid of patches, positions of three axes, frames of a video apart.

One id stands for images and videos, and only `mm_token_type_ids` tells them apart: a model here is given either.
`video_token_id`, which no prompt holds, is that id too: of any other, transformers finds no videos when it makes beams.
"""

import torch
from tiny import CACHE
from transformers import Glm4vConfig, Glm4vMoeConfig, Glm46VConfig, GlmgaConfig, GlmOcrConfig

from .common import END, HIDDEN, IMAGE, START, VIDEO, Picture, Tiny, placeholders, text, text_config

PATCH, TEMPORAL = 4, 2
OPEN, CLOSE = 6, 7  # of a video
AXES = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}
ROWS = ((3, (3, 4), 5), (2, (4, 3), 1, (2, 7), 3), (6,))
FILMS = (ROWS[0], (2, (4, 3), 1, (2, 7), 3, (2, 3, 4), 4), ROWS[2])  # the last of the second row is a video


def vision(**more):
    return {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL, "spatial_merge_size": 2, "out_hidden_size": HIDDEN, **more,
    }  # fmt: skip


def config(config_class=Glm4vConfig, text_type="glm4v_text", token=IMAGE, **more):
    def make():
        text = text_config(text_type, rope_parameters=AXES, **more)
        return config_class(
            vision_config=vision(image_size=8 * PATCH), text_config=text,
            image_token_id=token, video_token_id=token, image_start_token_id=START, image_end_token_id=END,
            video_start_token_id=OPEN, video_end_token_id=CLOSE,
        )  # fmt: skip

    return make


def grid(generator, height, width, frames=0, channels=3 * TEMPORAL):
    """Inputs of an image, or video, of so many merged patches a frame."""
    name, pixels = ("video", "pixel_values_videos") if frames else ("image", "pixel_values")
    size = [max(1, frames), 2 * height, 2 * width]
    patches = torch.randn(size[0] * size[1] * size[2], channels * PATCH * PATCH, generator=generator)
    return {pixels: patches, f"{name}_grid_thw": torch.tensor([size])}


def count(model):
    """Give a text turn on a kept cache its positions: the models count those of the whole mask, and fail."""

    def before(module, args, kwargs):
        mask, new = kwargs.get("attention_mask"), kwargs["input_ids"].shape[1]
        if kwargs.get(CACHE) is None or kwargs.get("position_ids") is not None or new == mask.shape[1]:
            return None
        ids = (mask.cumsum(-1) - 1)[:, -new:] + module.base_model.rope_deltas
        return args, {**kwargs, "position_ids": ids.expand(3, -1, -1)}

    model.register_forward_pre_hook(before, with_kwargs=True)


def picture(generator, height, width, frames=0):
    ids, visual = [OPEN] if frames else [], []
    for _ in range(max(1, frames)):
        one, places = placeholders(height * width, [START], [END], VIDEO if frames else IMAGE)
        visual += [len(ids) + x for x in places]
        ids += one + (text(generator, 2) if frames else [])  # its second
    return Picture(ids + [CLOSE] * bool(frames), visual, grid(generator, height, width, frames))


EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "head_dim": 8,
}  # fmt: skip


def tiny(*config_of, rows=ROWS, **more):
    return Tiny(
        config(*config_of, **more), picture, rows=rows, typed="mm_token_type_ids", positions=False, adjust=count
    )


TYPES = {
    "glm4v": tiny(),
    "glm4v:video": tiny(token=VIDEO, rows=((3, (2, 3, 2), 5), (2, (2, 2, 3), 1, (4, 2, 2), 3), (6,))),
    "glm46v": tiny(Glm46VConfig),
    "glmga": tiny(GlmgaConfig),
    "glm4v_moe": tiny(Glm4vMoeConfig, "glm4v_moe_text", **EXPERTS),
    "glm_ocr": tiny(GlmOcrConfig, "glm_ocr_text", head_dim=8),
}
