"""SmolVLM: Idefics3's tiles and prompt. The frames of a video have text between them: here each is an image."""

from operator import attrgetter

from lp_patch.layout import tiles
from lp_patch.registry import Adapter

from .idefics3 import split_images

ADAPTER = Adapter(
    model_type="smolvlm",
    family="SmolVLM",
    split=split_images,
    tower=attrgetter("vision_model"),
    language_model="text_model",
    layers="text_model.layers",
    rotary="text_model.rotary_emb",
    layout=tiles,
    blanks=True,
)
