"""Gemma 3: an image's tokens attend to one another in both directions, and most layers only to a window.

Crops of pan-and-scan have text between them: to the model, and here, each is an image.
"""

from operator import attrgetter

from lp_patch.adapters.llava import tower
from lp_patch.layout import tiles
from lp_patch.registry import Adapter

ADAPTER = Adapter(
    model_type="gemma3", family="Gemma 3", tower=tower, fewest=attrgetter("mm_tokens_per_image"), layout=tiles
)
