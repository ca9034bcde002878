"""ERNIE 4.5 VL: experts for text and others for pictures, told by `moe_mm_token_type_ids`; frames merge in pairs."""

import torch
from transformers import Ernie4_5_VLMoeConfig

from .common import END, IMAGE, START, VIDEO, Picture, Tiny, placeholders, text_config
from .glm4v import AXES, CLOSE, FILMS, OPEN, PATCH, count, grid

VISUAL = torch.tensor([IMAGE, START, END, VIDEO, OPEN, CLOSE])


def config():
    vision = {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": PATCH,
    }  # fmt: skip
    text = text_config(
        "ernie4_5_vl_moe_text", rope_parameters={**AXES, "mrope_section": [1, 1, 2]}, moe_num_experts=4, moe_k=2,
        moe_intermediate_size=[24, 16],
    )  # fmt: skip
    return Ernie4_5_VLMoeConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=START,
        image_end_token_id=END, video_start_token_id=OPEN, video_end_token_id=CLOSE,
    )  # fmt: skip


def picture(generator, height, width, frames=0):
    given = grid(generator, height, width, frames, channels=3)
    if frames:
        return Picture(*placeholders(height * width * frames // 2, [OPEN], [CLOSE], VIDEO), given)
    return Picture(*placeholders(height * width, [START], [END]), given)


def adjust(model):
    """Its processor says of each token whose experts it has, wrapping tokens included."""

    def before(module, args, kwargs):
        given = kwargs["input_ids"]
        return args, {**kwargs, "moe_mm_token_type_ids": torch.isin(given, VISUAL.to(given.device)).int()}

    count(model)
    model.register_forward_pre_hook(before, with_kwargs=True)


TYPES = {
    "ernie4_5_vl_moe": Tiny(config, picture, rows=FILMS, typed="mm_token_type_ids", positions=False, adjust=adjust)
}
