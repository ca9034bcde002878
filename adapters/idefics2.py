"""Idefics2: a row's images come as one feature, a fixed number of tokens for each tile; one boundary token parts tiles.

A processor that splits images writes five tiles for each, and its prompt does not tell tiles from images that follow
one another: where all that follow one another in a row are five, or a multiple, each five are taken for one image.
"""

from itertools import pairwise
from operator import attrgetter

from torch import Tensor

from lp_patch.registry import Adapter

TILES = 5  # four quarters and the whole


def split_images(ids: Tensor, positions: Tensor) -> list[int]:
    """Ids (S,) and visual positions (n,) of a row -> tokens of each of its images."""
    tiles = positions.tensor_split((positions.diff() > 1).nonzero().flatten() + 1)
    runs = [[len(tiles[0])]]
    for tile, following in pairwise(tiles):
        if int(following[0] - tile[-1]) > 2:
            runs.append([])
        runs[-1].append(len(following))
    if any(len(run) % TILES for run in runs):
        return [size for run in runs for size in run]
    return [sum(run[i : i + TILES]) for run in runs for i in range(0, len(run), TILES)]


ADAPTER = Adapter(
    model_type="idefics2",
    family="Idefics2",
    split=split_images,
    fewest=attrgetter("perceiver_config.resampler_n_latents"),
    language_model="text_model",
    layers="text_model.layers",
    rotary="text_model.rotary_emb",
    blanks=True,
)
