"""Mistral Large 4: Pixtral tower, merged patches in rows; latent keys, an indexer that picks keys, experts."""

import torch
from torch.nn.functional import pad
from transformers import AutoConfig

from .common import END, IMAGE, LAYERS, Picture, Tiny, pixels, text_config

LINE = 6
SIDE = 8  # pixels of a token, 2 x 2 patches


def config():
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "head_dim": 8, "patch_size": SIDE // 2, "image_size": 8 * SIDE,
    }  # fmt: skip
    text = text_config(
        "mistral_large4_text", num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=4,
        num_experts_per_tok=2, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, index_topk=12,
        index_head_dim=16, index_n_heads=16, num_hidden_layers=LAYERS,
    )  # fmt: skip
    return AutoConfig.for_model(
        "mistral_large4", vision_config=vision, text_config=text, image_token_index=IMAGE, spatial_merge_size=2
    )


def picture(generator, height, width):
    """Rows of tokens, each with a line break, the last with the end of the image."""
    ids = ([IMAGE] * width + [LINE]) * height
    sizes = torch.tensor([[SIDE * height, SIDE * width]])
    inputs = {"pixel_values": pixels(generator, 1, 3, SIDE * height, SIDE * width), "image_sizes": sizes}
    return Picture([*ids[:-1], END], [i for i, x in enumerate(ids) if x == IMAGE], inputs)


def collate(rows):
    """Pictures padded below and on the right to the size of the largest."""
    inputs = [picture.inputs for row in rows for picture in row]
    sizes = torch.cat([x["image_sizes"] for x in inputs])
    high, wide = sizes.amax(dim=0).tolist()
    padded = [
        pad(x["pixel_values"], (0, wide - w, 0, high - h)) for x, (h, w) in zip(inputs, sizes.tolist(), strict=True)
    ]
    return {"pixel_values": torch.cat(padded), "image_sizes": sizes}


def adjust(model):
    """What a checkpoint has learnt of positions, and a fresh model has not."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "softmax_scaling" in name or name.endswith("rotary_emb.alpha"):
            parameter.data += 0.3 * torch.rand(parameter.shape, generator=generator).to(parameter.dtype)


ROWS = ((3, (3, 4), 5), (2, (4, 3), 1, (2, 5), 3), (6,))
TYPES = {"mistral_large4": Tiny(config, picture, ROWS, collate=collate, adjust=adjust, static=False)}
