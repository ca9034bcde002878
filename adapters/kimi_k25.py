"""Kimi K2.5: merged patches of images of any size, over DeepSeek-V3's latent attention.

Four frames of a video become one, with a time stamp before it: to the model, and here, each such is a picture.
"""

from torch import Tensor

from lp_patch.layout import Pixels, join, stack_rows
from lp_patch.registry import IMAGE, VIDEO, Adapter


def _layout(pixels: Pixels) -> Tensor:
    """Patches in rows; a token has those of all frames that became one."""
    sizes = [(int(t), int(h), int(w)) for t, h, w in pixels.about("grid_thw").tolist()]
    clips = pixels.main.flatten(1).split([t * h * w for t, h, w in sizes])
    parts = [x.view(t, h * w, -1).transpose(0, 1).flatten(1) for x, (t, h, w) in zip(clips, sizes, strict=True)]
    return join(stack_rows(parts), [(h, w) for _, h, w in sizes], pixels.count)


ADAPTER = Adapter(model_type="kimi_k25", family="Kimi K2.5", modalities=(IMAGE, VIDEO), layout=_layout)
