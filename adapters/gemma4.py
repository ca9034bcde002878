"""Gemma 4: images of any size, pooled; a video's frames have text between them, and share the budget of the video.

Most layers attend to a window; in some models an image's or frame's tokens see one another in both directions. The
unified type has no vision tower: pixels are projected.
"""

import torch
from torch import Tensor

from lp_patch.layout import Pixels, join
from lp_patch.registry import IMAGE, VIDEO, Adapter

PER_LAYER = ("per_layer_inputs", "per_layer_input")  # of the language model, of a layer


def _layout(pixels: Pixels) -> Tensor:
    """Patches come with their places (x, y), -1 where there is none."""
    places = pixels.about("position_ids").flatten(0, -3)
    views = zip(pixels.main.flatten(0, -3), places, strict=True)
    real = [(x[at[:, 0] >= 0], at[at[:, 0] >= 0]) for x, at in views]
    inside = [x[torch.argsort(at[:, 1] * (1 + at.max()) + at[:, 0])] for x, at in real]
    return join(torch.cat(inside), [(int(at[:, 1].max()) + 1, int(at[:, 0].max()) + 1) for _, at in real], pixels.count)


ADAPTERS = (
    Adapter(model_type="gemma4", family="Gemma 4", modalities=(IMAGE, VIDEO), per_token=PER_LAYER, layout=_layout),
    Adapter(
        model_type="gemma4_unified", family="Gemma 4", modalities=(IMAGE, VIDEO), per_token=PER_LAYER, layout=_layout
    ),
)
