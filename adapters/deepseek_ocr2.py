"""DeepSeek-OCR 2: tiles, the whole image and a learnt separator, without a token between them, are one feature.

The separator carries no picture, and the model has never seen an image without it: it is kept and not counted.
"""

from typing import Any

from torch import Tensor

from lp_patch.registry import Adapter


def separators(base: Any, embeds: Tensor) -> Tensor:
    """Rows of embeds (B, S, D) that are the learnt separator: (B, S) bool."""
    return (embeds == base.view_separator.to(embeds)).all(dim=-1)


ADAPTER = Adapter(model_type="deepseek_ocr2", family="DeepSeek-OCR 2", structural=separators)
