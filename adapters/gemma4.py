"""Gemma 4: images of any size, pooled; a video's frames have text between them, and share the budget of the video.

Most layers attend to a window; in some models an image's or frame's tokens see one another in both directions. The
unified type has no vision tower: pixels are projected.
"""

from lp_patch.registry import IMAGE, VIDEO, Adapter

PER_LAYER = ("per_layer_inputs", "per_layer_input")  # of the language model, of a layer

ADAPTERS = (
    Adapter(model_type="gemma4", family="Gemma 4", modalities=(IMAGE, VIDEO), per_token=PER_LAYER),
    Adapter(model_type="gemma4_unified", family="Gemma 4", modalities=(IMAGE, VIDEO), per_token=PER_LAYER),
)
