"""Dots3 Note: merged patches; latent keys, of which an indexer picks some, and windows in the other layers."""

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTER = Adapter(model_type="dots3_note", family="Dots3 Note", modalities=(IMAGE, VIDEO), layout=merged)
