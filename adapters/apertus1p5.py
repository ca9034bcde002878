"""Apertus 1.5: pictures of any size are codes of the vocabulary; line breaks and audio are text to lp_patch."""

from lp_patch.layout import pages
from lp_patch.registry import Adapter

ADAPTER = Adapter(model_type="apertus1p5", family="Apertus 1.5", layout=pages)
