"""Ovis2: a small copy of the image, then its tiles, each behind a token of its own that says where it stands."""

from operator import attrgetter

from torch import Tensor

from lp_patch.layout import tiles
from lp_patch.registry import Adapter


def split_images(ids: Tensor, positions: Tensor) -> list[int]:
    """Ids (S,) and visual positions (n,) of a row -> tokens of each of its images.

    The token that opens the row's first image opens every other; one that stands before a tile is another.
    """
    opening = ids[positions[0] - 1]
    sizes: list[int] = []
    for tile in positions.tensor_split((positions.diff() > 1).nonzero().flatten() + 1):
        if not sizes or ids[tile[0] - 1] == opening:
            sizes.append(0)
        sizes[-1] += len(tile)
    return sizes


ADAPTER = Adapter(
    model_type="ovis2",
    family="Ovis2",
    split=split_images,
    tower=attrgetter("vision_tower.transformer"),  # the whole tower joins patches
    layout=tiles,
)
