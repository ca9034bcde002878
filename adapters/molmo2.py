"""Molmo 2: a small view of the image and its crops are one feature, added to the placeholders' embeddings.

All pictures of a prompt see one another in both directions. Line breaks are text to the model. Images and videos have
the same placeholder: a call shows only one of both.
"""

from operator import attrgetter

from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTER = Adapter(
    model_type="molmo2",
    family="Molmo 2",
    modalities=(IMAGE, VIDEO),
    tower=attrgetter("vision_tower"),
)
