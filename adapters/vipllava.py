"""ViP-LLaVA: features of several CLIP layers, joined; two-layer projector after a norm."""

from lp_patch.layout import tiles
from lp_patch.registry import Adapter

ADAPTER = Adapter(model_type="vipllava", family="ViP-LLaVA", layout=tiles)
