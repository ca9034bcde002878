"""What lies under each visual token: the pixels that it was made of, regrouped as the families order their tokens.

A layout is a function of `Pixels` that answers (N, E): for each of a call's N counted visual tokens of one modality, in
the prompt's order, the E elements of the processor's pixel tensors under it. It moves elements and changes none, so
that it can be asked with any tensors of these shapes: with pictures that tell where they are, `locate` finds where each
token is. Rows with fewer elements end in NaN, and so does what no picture filled.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """What a processor made of all pictures of a call, of one modality.

    Attributes:
        base: the module that merges image and text.
        values: tensors of pixels, by the names of the model's arguments, floating point.
        inputs: everything else that the processor answered, by name.
        count: counted visual tokens that the call has.
        video: whether these are videos.
    """

    base: Any
    values: dict[str, Tensor]
    inputs: dict[str, Any]
    count: int
    video: bool = False

    @property
    def main(self) -> Tensor:
        """The pixels of the pictures, or of the videos."""
        names = ("pixel_values_videos",) if self.video else ("pixel_values", "pixel_values_images")  # Video-LLaVA's
        return next(self.values[name] for name in names if name in self.values)

    def about(self, name: str) -> Tensor:
        """A tensor about the pictures, or the videos, such as "grid_thw"."""
        return torch.as_tensor(self.inputs[f"{'video' if self.video else 'image'}_{name}"])

    @property
    def patch(self) -> int:
        """The side of a patch in pixels; 1 where the config does not tell."""
        vision = getattr(self.base.config, "vision_config", None)
        size = getattr(vision, "patch_size", 1)
        return size[0] if isinstance(size, (list, tuple)) else size


Layout = Callable[[Pixels], Tensor]


def tiles(pixels: Pixels) -> Tensor:
    """(..., C, H, W) of pictures, tiles or frames, each of as many tokens, in rows from its top left corner.

    A first token more, such as [CLS], has all of its tile; tiles that nothing filled are none.
    """
    views = _filled(pixels.main.flatten(0, -4))
    return cells(views, pixels.count // max(1, len(views)), pixels.patch)


def merged(pixels: Pixels) -> Tensor:
    """(P, ...) patches, of which as many that follow one another make each token."""
    patches = pixels.main.flatten(1)
    return patches.reshape(pixels.count, -1)


def rows_of_patches(pixels: Pixels) -> Tensor:
    """(P, ...) patches of all pictures and frames in rows, grid by grid (`grid_thw`); m x m that touch make a token."""
    sizes = [(int(h), int(w)) for t, h, w in pixels.about("grid_thw").tolist() for _ in range(int(t))]
    return join(pixels.main.flatten(1), sizes, pixels.count)


def pages(pixels: Pixels) -> Tensor:
    """(n, C, H, W) of pictures of any size, padded on the right and below to the largest; `image_sizes` has theirs."""
    sizes = [(int(h), int(w)) for h, w in pixels.about("sizes").tolist()]
    fitting = (m * pixels.patch for m in range(1, max(map(max, sizes)) + 1))
    side = next((c for c in fitting if sum((h // c) * (w // c) for h, w in sizes) == pixels.count), None)
    if side is None:
        return pixels.main.new_zeros(0, 0)
    views = [
        view[None, :, : h // side * side, : w // side * side] for view, (h, w) in zip(pixels.main, sizes, strict=True)
    ]
    return torch.cat([_grid(x, x.shape[2] // side, x.shape[3] // side, side).squeeze(0) for x in views])


def packed(pixels: Pixels, **options: Any) -> Tensor:
    """(n, tiles, C, H, W), packed by the model's own method: without padding, rows of all tiles, line breaks left out.

    Args:
        options: of the method.
    """
    side = pixels.base.config.vision_config.image_size // pixels.patch
    views = [cells(_filled(x), side * side, pixels.patch).unflatten(0, (-1, side * side)) for x in pixels.main]
    line = pixels.main.new_full(views[0].shape[-1:], torch.inf)
    found, _ = pixels.base.pack_image_features(views, pixels.about("sizes"), image_newline=line, **options)
    rows = torch.cat(list(found))
    return rows[~rows.isinf().all(dim=1)]


def cells(views: Tensor, count: int, patch: int = 1) -> Tensor:
    """(n, C, H, W), each of `count` tokens in a square, and perhaps one before them: (n * count, E).

    Args:
        patch: pixels of a patch; a remainder at the right and below that makes no patch is in no token.
    """
    side = math.isqrt(count)
    if side == 0 or count - side * side not in (0, 1):
        return views.new_zeros(0, 0)
    step = views.shape[-1] // patch // side * patch or views.shape[-1] // side
    found = _grid(views, side, side, step)
    if count > side * side:
        whole = views.flatten(1)[:, None]
        found = stack_rows([x for pair in zip(whole, found, strict=True) for x in pair])
        return found
    return found.flatten(0, 1)


def join(patches: Tensor, sizes: Sequence[tuple[int, int]], count: int) -> Tensor:
    """(P, E) patches of grids of these sizes (rows, columns), in rows: m x m that touch make one of `count` tokens."""
    side = math.isqrt(len(patches) // count)
    found = []
    for part, (height, width) in zip(patches.split([math.prod(x) for x in sizes]), sizes, strict=True):
        rows, columns = height // side, width // side
        grid = part.view(height, width, -1)[: rows * side, : columns * side]
        found.append(grid.reshape(rows, side, columns, side, -1).transpose(1, 2).reshape(rows * columns, -1))
    return torch.cat(found)


def stack_rows(parts: Sequence[Tensor]) -> Tensor:
    """(n, E) of any widths below one another, filled up with NaN."""
    width = max(x.shape[1] for x in parts)
    return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1]), value=torch.nan) for x in parts])


def _grid(views: Tensor, rows: int, columns: int, step: int) -> Tensor:
    """(n, C, H, W) -> (n, rows * columns, E): squares of `step` pixels."""
    cut = views[:, :, : rows * step, : columns * step]
    split = cut.unflatten(3, (columns, step)).unflatten(2, (rows, step))
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _filled(views: Tensor) -> Tensor:
    """The views (n, C, H, W) that a picture filled, at least in part."""
    return views[~views.flatten(1).isnan().all(dim=1)]
