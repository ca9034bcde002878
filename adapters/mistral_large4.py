"""Mistral Large 4: Mistral 3's tower and line breaks; an indexer picks keys, and queries grow with position."""

from lp_patch.layout import pages
from lp_patch.registry import Adapter

ADAPTER = Adapter(model_type="mistral_large4", family="Mistral Large 4", layout=pages)
