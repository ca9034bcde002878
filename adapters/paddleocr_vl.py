"""PaddleOCR-VL: images of any size; its projector merges 2 x 2 patches, so stage 1 prunes what comes out of it."""

from lp_patch.layout import rows_of_patches
from lp_patch.registry import Adapter

ADAPTER = Adapter(model_type="paddleocr_vl", family="PaddleOCR-VL", layout=rows_of_patches)
