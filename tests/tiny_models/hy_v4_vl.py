"""Hunyuan 4 VL: rows of merged patches end in a line break; picked latent keys, shared by layers; residual streams."""

import torch
from transformers import AutoConfig

from .common import END, HIDDEN, IMAGE, LAYERS, START, VIDEO, Picture, Tiny, text_config
from .glm4v import count

PATCH = 4


def config():
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": PATCH, "max_image_size": 8 * PATCH, "out_hidden_size": HIDDEN,
    }  # fmt: skip
    text = text_config(
        "hy_v4_vl_text", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, index_topk=12,
        index_head_dim=16, index_n_heads=16, indexer_types=["full", "full", "full", "shared", "full", "shared"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        mlp_layer_types=["dense", *["sparse"] * (LAYERS - 1)],
    )  # fmt: skip
    return AutoConfig.for_model(
        "hy_v4_vl", vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO
    )


def picture(generator, *size):
    """An image of h x w merged patches, or a video of t x h x w."""
    t, h, w = (1, *size)[-3:]
    kind, token, name = ("image", IMAGE, "pixel_values") if t == 1 else ("video", VIDEO, "pixel_values_videos")
    places = range(1, 1 + t * h * (w + 1))
    breaks = [i for i in places if i % (w + 1) == 0]
    values = torch.randn(t * 4 * h * w, 3 * PATCH**2, generator=generator)
    inputs = {name: values, f"{kind}_grid_thw": torch.tensor([[t, 2 * h, 2 * w]])}
    return Picture([START, *[token] * len(places), END], [i for i in places if i not in breaks], inputs, breaks)


def eager(model):
    """The one attention that the class has, whatever is asked for."""
    model.set_attn_implementation("eager")
    model.set_attn_implementation = lambda implementation: None
    return model


def adjust(model):
    """What transformers leaves as it finds it, in memory: the line break, and weights of the residual streams."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("image_newline", "sinks", ".base", ".scale", "hc_base", "hc_scale")):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    count(model)


ROWS = ((3, (3, 4), 5), (2, (4, 3), 1, (2, 2, 5), 3), (6,))
TYPES = {
    "hy_v4_vl": Tiny(
        config, picture, rows=ROWS, typed="mm_token_type_ids", positions=False, adjust=adjust, patch=eager, static=False
    )
}
