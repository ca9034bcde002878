"""Mistral Small 3.1 and later: merged patches of images of any size; line breaks between them are text to the model."""

from lp_patch.layout import pages
from lp_patch.registry import Adapter

ADAPTER = Adapter(model_type="mistral3", family="Mistral 3", layout=pages)
