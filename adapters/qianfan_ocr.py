"""Qianfan-OCR: tiles and thumbnail as in InternVL, over Qwen3."""

from operator import attrgetter

from lp_patch.layout import tiles
from lp_patch.registry import Adapter

ADAPTER = Adapter(
    model_type="qianfan_ocr",
    family="Qianfan-OCR",
    merge_adjacent=True,
    tower=attrgetter("vision_tower"),
    fewest=attrgetter("image_seq_length"),  # of a tile
    layout=tiles,
)
