"""Command A Vision and Aya Vision: tiles of an image share its budget, though a token stands between them.

Pixel shuffle joins 2 x 2 patches; stage 1 prunes what the projector makes of them.
"""

from typing import Any

from torch import Tensor

from lp_patch.adapters.llava import patches, tower
from lp_patch.layout import tiles
from lp_patch.registry import Adapter


def _fewest(config: Any) -> int | None:
    """Tokens of a tile."""
    count = patches(config)
    return None if count is None else count // config.downsample_factor**2


def split_by_gaps(ids: Tensor, positions: Tensor) -> list[int]:
    """Ids (S,) and visual positions (n,) of a row -> tokens of each image: tiles have one token between them."""
    ends = (positions.diff() > 2).nonzero().flatten() + 1
    return [len(x) for x in positions.tensor_split(ends)]


def split_by_ends(ids: Tensor, positions: Tensor) -> list[int]:
    """Ids (S,) and visual positions (n,) of a row -> tokens of each image: what follows the last one ends them all.

    A tile's name, which stands in front of it, may be several tokens.
    """
    closing = int(ids[positions[-1] + 1]) if positions[-1] + 1 < len(ids) else -1
    ends = (ids[positions[:-1] + 1] == closing).nonzero().flatten() + 1
    return [len(x) for x in positions.tensor_split(ends)]


ADAPTERS = (
    Adapter(
        model_type="cohere2_vision",
        family="Command A Vision",
        split=split_by_gaps,
        tower=tower,
        fewest=_fewest,
        layout=tiles,
    ),
    Adapter(
        model_type="aya_vision", family="Aya Vision", split=split_by_ends, tower=tower, fewest=_fewest, layout=tiles
    ),
)
