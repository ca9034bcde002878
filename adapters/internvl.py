"""InternVL: the tiles of an image and its thumbnail follow one another in the prompt and share one budget.

Pixel shuffle joins 2 x 2 patches; stage 1 prunes what the projector makes of them. The frames of a video have text
between them: to the model, and here, each is an image.
"""

from operator import attrgetter

from lp_patch.layout import tiles
from lp_patch.registry import Adapter

ADAPTER = Adapter(
    model_type="internvl",
    family="InternVL",
    merge_adjacent=True,
    tower=attrgetter("vision_tower"),
    fewest=attrgetter("image_seq_length"),  # of a tile
    layout=tiles,
)
