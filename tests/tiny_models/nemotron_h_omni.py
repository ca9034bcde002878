"""Nemotron 3 Omni without audio: packed patches of images of any size; Mamba 2, expert and attention layers."""

from functools import partial
from operator import attrgetter

import torch
from transformers import AutoConfig, RadioConfig

from .common import END, IMAGE, START, Picture, Tiny, pixels, placeholders, text_config
from .qwen3_5 import remember

PATCH = 4
LETTERS = {"M": "linear_attention", "E": "moe", "*": "full_attention"}


def config():
    vision = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0, "patch_size": PATCH,
        "max_img_size": 16 * PATCH, "num_registers": 1, "video_temporal_patch_size": 2,
    }  # fmt: skip
    text = text_config(
        "nemotron_h", layers_block_type=[LETTERS[x] for x in "MEM*EM*E"], head_dim=8, ssm_state_size=8,
        mamba_num_heads=4, mamba_head_dim=8, n_groups=2, chunk_size=16, n_routed_experts=4, moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24, time_step_min=1e-9,  # a prefill heeds it, a step does not
    )  # fmt: skip
    del text["num_hidden_layers"]
    return AutoConfig.for_model(
        "nemotron_h_omni", vision_config=vision, text_config=text, image_token_id=IMAGE, projector_hidden_size=24,
        vision_hidden_size=16,
    )  # fmt: skip


def picture(generator, height, width):
    rows = pixels(generator, 4 * height * width, 3, PATCH, PATCH).flatten(1)
    grid = torch.tensor([[2 * height, 2 * width]])
    return Picture(*placeholders(height * width, [START], [END]), {"pixel_values": rows, "image_grid_hw": grid})


class TowerConfig(RadioConfig):
    """The model asks its tower for `torch_dtype`, which transformers' own config calls deprecated."""

    torch_dtype = property(attrgetter("dtype"))


def adjust(model):
    """The language model is a whole one with a head, so that the model itself has neither decoder nor head."""
    remember(model)
    model.vision_model.config.__class__ = TowerConfig
    model.vision_model.config.dtype = model.dtype  # to which pictures are cast
    model.get_decoder = partial(getattr, model.language_model, "model")
    model.get_output_embeddings = partial(getattr, model.language_model, "lm_head")


ROWS = ((3, (3, 4), 5), (2, (4, 3), 1, (2, 5), 3), (6,))
TYPES = {"nemotron_h_omni": Tiny(config, picture, ROWS, adjust=adjust, oracle={"attention": "mixer"}, layer=4)}
