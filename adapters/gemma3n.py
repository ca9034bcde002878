"""Gemma 3n: layers hold several streams of their tokens (AltUp), most see a window; sound is text to lp_patch."""

from operator import attrgetter

from lp_patch.layout import tiles
from lp_patch.registry import Adapter

from .gemma4 import PER_LAYER

ADAPTER = Adapter(
    model_type="gemma3n",
    family="Gemma 3n",
    fewest=attrgetter("vision_soft_tokens_per_image"),
    per_token=PER_LAYER,
    streams=True,
    layout=tiles,
)
