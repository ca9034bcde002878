"""Step 3.7: crops of an image and the whole are one feature, with tokens between them in the prompt."""

from itertools import islice

from torch import Tensor

from lp_patch.layout import Pixels, cells, stack_rows
from lp_patch.registry import Adapter


def _layout(pixels: Pixels) -> Tensor:
    """Convolutions shrink the patches of crops and of the whole four times to a side."""
    found, local = [], iter(pixels.values.get("pixel_values_local", ()))
    for whole, crops in zip(pixels.main, pixels.inputs["num_local_patches"], strict=True):
        for view in [*islice(local, int(crops)), whole]:
            found.append(cells(view[None], (view.shape[-1] // pixels.patch // 4) ** 2))
    return stack_rows(found)


ADAPTER = Adapter(model_type="step3p7", family="Step 3.7", layout=_layout)
