"""HunYuan-VL: merged patches of images of any size, with line breaks among them; four rotary axes."""

from functools import partial
from itertools import groupby

import torch
from tiny import CACHE
from transformers import AutoConfig

from .common import END, IMAGE, START, Picture, Tiny, pixels, text_config

PATCH = 4
ROPE = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}


def config():
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": PATCH, "max_image_size": 16 * PATCH,
    }  # fmt: skip
    text = text_config("hunyuan_vl_text", head_dim=16, rope_parameters=ROPE, tie_word_embeddings=False)
    return AutoConfig.for_model(
        "hunyuan_vl", vision_config=vision, text_config=text, image_token_id=IMAGE, im_start_id=START, im_end_id=END,
        tie_word_embeddings=False,
    )  # fmt: skip


def picture(generator, height, width):
    """A row that begins the image, lines of width tokens and their break, a row that ends it; all in one run."""
    lines = height * (width + 1)
    ids = [START, *[IMAGE] * (lines + 2), END]
    breaks = [1 + (width + 1) * i for i in range(1, height + 1)]
    structural = [1, *breaks, lines + 2]
    rows = pixels(generator, 4 * height * width, 3, PATCH, PATCH).flatten(1)
    inputs = {"pixel_values": rows, "image_grid_thw": torch.tensor([[1, 2 * height, 2 * width]])}
    return Picture(ids, [i for i in range(1, lines + 3) if i not in structural], inputs, structural)


def rows_alone(get_rope_index, input_ids, mm_token_type_ids, image_grid_thw=None, attention_mask=None, **kwargs):
    """`get_rope_index` of each row by itself: transformers goes on numbering images from one row to the next."""
    found, first = [], 0
    for i, types in enumerate(mm_token_type_ids.tolist()):
        row = slice(i, i + 1)
        count = sum(kind == 1 for kind, _ in groupby(types))
        grids = None if image_grid_thw is None else image_grid_thw[first : first + count]
        mask = None if attention_mask is None else attention_mask[row]
        found.append(get_rope_index(input_ids[row], mm_token_type_ids[row], grids, mask))
        first += count
    return torch.cat([x for x, _ in found], dim=1), torch.cat([x for _, x in found])


def count(model, args, kwargs):
    """Positions of a later turn, as generate() gives them: transformers' own forward counts padding too."""
    cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
    if cache is not None and cache.get_seq_length() and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = (mask.cumsum(-1) - 1)[:, -kwargs["input_ids"].shape[1] :]
    return args, kwargs


def adjust(model):
    model.model.get_rope_index = partial(rows_alone, model.model.get_rope_index)
    model.register_forward_pre_hook(count, with_kwargs=True)


ROWS = ((3, (3, 4), 5), (2, (4, 3), 1, (2, 5), 3), (6,))
TYPES = {
    "hunyuan_vl": Tiny(config, picture, ROWS, typed="mm_token_type_ids", positions=False, adjust=adjust),
}
