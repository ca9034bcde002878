"""MiniCPM-V 4.6 and 4.7, MiniCPM-OCR: Qwen3.5's language model; an overview of an image, then its slices, each wrapped.

An image and its slices share one budget. The frames of a video follow one another like images: here each is one.
"""

import torch
from torch import Tensor

from lp_patch.layout import Pixels, join
from lp_patch.registry import IMAGE, VIDEO, Adapter


def split_images(ids: Tensor, positions: Tensor) -> list[int]:
    """Ids (S,) and visual positions (n,) of a row -> tokens of each of its images.

    The first run of visual tokens is an overview, and so is each that the same token opens; slices have another.
    """
    runs = positions.tensor_split((positions.diff() > 1).nonzero().flatten() + 1)
    opening = [int(ids[run[0] - 1]) if run[0] else -1 for run in runs]
    sizes: list[int] = []
    for run, token in zip(runs, opening, strict=True):
        if token == opening[0]:
            sizes.append(0)
        sizes[-1] += len(run)
    return sizes


def _layout(pixels: Pixels) -> Tensor:
    """The pixels are (1 or frames, C, P, patches * P), all patches side by side."""
    sizes = torch.as_tensor(pixels.inputs["target_sizes_videos" if pixels.video else "target_sizes"])
    patches = pixels.main.unflatten(3, (-1, pixels.patch)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)
    return join(patches, [(int(h), int(w)) for h, w in sizes.tolist()], pixels.count)


ADAPTERS = tuple(
    Adapter(model_type=model_type, family=family, modalities=(IMAGE, VIDEO), split=split_images, layout=_layout)
    for model_type, family in (
        ("minicpmv4_6", "MiniCPM-V 4.6"),
        ("minicpmv4_7", "MiniCPM-V 4.7"),
        ("minicpm_ocr", "MiniCPM-OCR"),
    )
)
