"""FastVLM: a convolutional tower (of timm), whose last map is the picture's tokens."""

from lp_patch.layout import tiles
from lp_patch.registry import Adapter

ADAPTER = Adapter(model_type="fast_vlm", family="FastVLM", layout=tiles)
