"""LightOnOCR: Pixtral patches, 2 x 2 merged, of pages of any size, without line breaks; Qwen3."""

from lp_patch.layout import pages
from lp_patch.registry import Adapter

ADAPTER = Adapter(model_type="lighton_ocr", family="LightOnOCR", layout=pages)
