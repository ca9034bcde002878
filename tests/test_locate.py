"""Where tokens lie in the user's picture, through the real processors: a square painted there changes that token."""

import inspect

import numpy as np
import pytest
import torch
import families
import test_processors
from PIL import Image
from test_processors import CASES, found, model_of, torchvision  # noqa: F401

from lp_patch.errors import UnsupportedInputError
from lp_patch.locate import locate, shapes_of
from lp_patch.registry import find_parts

SQUARE, SQUARES = 5, 10  # pixels to a side; how many are painted
NOWHERE = {"aria", "idefics2", "idefics2:whole", "deepseek_ocr2"}
BLURRED = {"fast_vlm", "got_ocr2", "emu3"}  # tests/test_layout.py has these
PIXTRAL = ("PixtralImageProcessorPil", {"patch_size": {"height": 4, "width": 4}, "size": {"longest_edge": 64}})
QWEN = test_processors.QWEN["images"]
# families whose tiny models are in tests/families.py: their image processors
CLASSIC = {
    "llava": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}}),
    "llava_next": ("LlavaNextImageProcessorPil", {}),
    "llava_onevision": ("LlavaOnevisionImageProcessorPil", {}),
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "internvl": ("GotOcr2ImageProcessorPil", {**test_processors.TILES}),
    "idefics3": ("Idefics3ImageProcessorPil", {}),
    "smolvlm": ("SmolVLMImageProcessorPil", {}),
    "mistral3": PIXTRAL,
}
