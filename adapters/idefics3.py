"""Idefics3 and SmolVLM: a row's images come as one feature, cut where the prompt's own tokens say that one ends.

The frames of SmolVLM's videos have text between them: here each is an image.
"""

from itertools import pairwise
from operator import attrgetter

from torch import Tensor

from lp_patch.layout import tiles
from lp_patch.registry import Adapter


def split_images(ids: Tensor, positions: Tensor) -> list[int]:
    """Ids (S,) and visual positions (n,) of a row -> tokens of each of its images.

    A tile is an opening token, one that says which tile it is, and the tile's own. Line breaks part the rows of tiles;
    the whole image comes last, and the opening token after it closes the image.
    """
    tiles = positions.tensor_split((positions.diff() > 1).nonzero().flatten() + 1)
    opening = int(ids[positions[0] - 2]) if positions[0] >= 2 else -1
    sizes = [len(tiles[0])]
    for tile, following in pairwise(tiles):
        closed = int(ids[tile[-1] + 1]) == opening and int(following[0] - tile[-1]) != 3
        if int(ids[following[0] - 2]) == opening and not closed:
            sizes[-1] += len(following)
        else:
            sizes.append(len(following))
    return sizes


ADAPTERS = tuple(
    Adapter(
        model_type=model_type,
        family=family,
        split=split_images,
        tower=attrgetter("vision_model"),
        language_model="text_model",
        layers="text_model.layers",
        rotary="text_model.rotary_emb",
        layout=tiles,
        blanks=True,
    )
    for model_type, family in (("idefics3", "Idefics3"), ("smolvlm", "SmolVLM"))
)
