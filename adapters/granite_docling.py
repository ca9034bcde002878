"""Granite Docling: Idefics3's tiles with DeepStack; a row's pages come as one feature, cut here at each first tile."""

from operator import attrgetter
from typing import Any

from torch import Tensor

from lp_patch.layout import tiles
from lp_patch.registry import Adapter

from .qwen3_vl import deepstack_layers


def split_pages(ids: Tensor, positions: Tensor) -> list[int]:
    """Ids (S,) and visual positions (n,) of a row -> tokens of each of its pages.

    The token before a tile says which one it is, and every page begins with the one of row 1 and column 1.
    """
    tiles = positions.tensor_split((positions.diff() > 1).nonzero().flatten() + 1)
    named = [int(ids[tile[0] - 1]) for tile in tiles]
    sizes: list[int] = []
    for tile, name in zip(tiles, named, strict=True):
        if name == named[0]:
            sizes.append(0)
        sizes[-1] += len(tile)
    return sizes


def _tile(config: Any) -> int:
    vision = config.vision_config
    return (vision.image_size // vision.patch_size // vision.scale_factor) ** 2


ADAPTER = Adapter(
    model_type="granite_docling",
    family="Granite Docling",
    split=split_pages,
    tower=attrgetter("vision_model"),
    first_cut=deepstack_layers,
    fewest=_tile,
    language_model="text_model",
    layers="text_model.layers",
    rotary="text_model.rotary_emb",
    layout=tiles,
)
