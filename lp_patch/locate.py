"""Where each visual token lies in its picture, found by showing the processor pictures that tell where they are.

A picture whose grey grows from left to right goes through the user's own processor, resized, cropped, tiled, padded,
normalised as it may be; what is under a token then says how far to the right it lies. So no processor's rules are
written down here, and `layout` needs to know only in which order a model's tokens come.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UnsupportedInputError
from .layout import Layout, Pixels


@dataclass(frozen=True)
class Located:
    """Where the N visual tokens of one modality lie, in the prompt's order.

    Attributes:
        picture: (N,) int64, which picture or video, in the order given; -1 for a token that shows padding alone.
        frame: (N,) int64, which frame of a video, the first where a token has several; 0 in pictures.
        box: (N, 4) float32, left, top, right, bottom, as shares of the picture's width and height.
    """

    picture: Tensor
    frame: Tensor
    box: Tensor


def locate(
    base: Any,
    layout: Layout,
    process: Callable[[Any], Any],
    shapes: Any,
    count: int,
    video: bool = False,
) -> Located:
    """Where the tokens of pictures lie.

    Args:
        base: the module that merges image and text.
        layout: of the family.
        process: from pictures, nested as the user's are, what the processor answers.
        shapes: in the place of each picture or video (frames, height, width), in lists as the user's are.
        count: counted visual tokens that the call had of this modality.

    Raises:
        UnsupportedInputError: the processor makes another number of tokens of these pictures.
    """
    total = len(flat(shapes))

    def seen(level: Callable[[int, int, int, int], np.ndarray]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        answer = dict(process(_drawn(shapes, level, video)))
        names = [n for n, x in answer.items() if "pixel_values" in n and isinstance(x, Tensor)]
        return {n: answer[n].double() for n in names}, {n: x for n, x in answer.items() if n not in names}

    black, inputs = seen(lambda number, frame, height, width: np.zeros((height, width)))
    white, _ = seen(lambda number, frame, height, width: np.ones((height, width)))

    def under(level: Callable[[int, int, int, int], np.ndarray]) -> Tensor:
        """(N, E), what lies under each token, 0 to 1; NaN where no picture is."""
        values, _ = seen(level)
        shown = {}
        for name, dark in black.items():
            span = white[name] - dark
            shown[name] = ((values[name] - dark) / span).where(span.abs() > 1e-3, torch.nan)
        message = (
            f"the processor makes other tokens of these {'videos' if video else 'pictures'} than the {count} of the "
            "latest prefill: give all of its pictures, in the same lists as the processor was given, with the same "
            "options for it (such as max_pixels=...)"
        )
        try:
            found = layout(Pixels(base, shown, inputs, count, video))
        except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:  # of shapes that do not fit
            raise UnsupportedInputError(message) from error
        if len(found) != count:
            raise UnsupportedInputError(message)
        return found

    columns = under(lambda number, frame, height, width: np.tile((np.arange(width) + 0.5) / width, (height, 1)))
    rows = under(lambda number, frame, height, width: np.tile((np.arange(height) + 0.5) / height, (width, 1)).T)
    numbers = under(lambda number, frame, height, width: np.full((height, width), number / max(1, total - 1)))
    picture = (numbers.nanmean(dim=1) * (total - 1)).nan_to_num(-1).round().long()
    frame = torch.zeros_like(picture)
    if video:
        longest = max(1, *(shape[0] - 1 for shape in flat(shapes)))
        times = under(lambda number, frame, height, width: np.full((height, width), frame / longest))
        frame = (times.nanmean(dim=1) * longest - 0.5).nan_to_num(0).ceil().clamp(min=0).long()
    (left, right), (top, bottom) = _extent(columns), _extent(rows)
    return Located(picture, frame, torch.stack([left, top, right, bottom], dim=1).float())


def flat(nested: Any) -> list:
    """The entries of lists of lists, in order."""
    return [x for part in nested for x in flat(part)] if isinstance(nested, list) else [nested]


def _extent(under: Tensor) -> tuple[Tensor, Tensor]:
    """(N, E) coordinates spread evenly over each token -> where it begins and ends, (N,) each, 0 to 1."""
    middle = under.nanmean(dim=1)
    # of numbers spread evenly over a length, the standard deviation is that length over the root of 12
    half = (under - middle[:, None]).square().nanmean(dim=1).sqrt() * 3**0.5
    return (middle - half).clamp(0, 1), (middle + half).clamp(0, 1)


def _drawn(shapes: Any, level: Callable[[int, int, int, int], np.ndarray], video: bool) -> Any:
    """Grey pictures (videos: lists of them) of these shapes, in lists alike; `level` is 0 to 1."""
    from PIL import Image

    numbers = iter(range(len(flat(shapes))))

    def draw(nested: Any) -> Any:
        if isinstance(nested, list):
            return [draw(x) for x in nested]
        number, (frames, height, width) = next(numbers), nested
        grey = [np.round(255 * level(number, frame, height, width)).astype(np.uint8) for frame in range(frames)]
        drawn = [Image.fromarray(x).convert("RGB") for x in grey]
        return np.stack([np.asarray(x) for x in drawn]) if video else drawn[0]

    return draw(shapes)


def shapes_of(pictures: Any, video: bool) -> Any:
    """In the place of each picture (frames, height, width): of PIL pictures, or arrays (..., H, W, 3)."""
    if isinstance(pictures, (list, tuple)) and not (video and _is_video(pictures)):
        return [shapes_of(x, video) for x in pictures]
    if video:
        return (len(pictures), *frame_array(pictures[0]).shape[:2])
    return (1, *frame_array(pictures).shape[:2])


def _is_video(value: Any) -> bool:
    """Whether this is one video: frames of pictures."""
    return len(value) > 0 and not isinstance(value[0], (list, tuple)) and np.asarray(value[0]).ndim == 3


def frame_array(picture: Any) -> np.ndarray:
    """A picture as (H, W, 3) uint8."""
    array = np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture)
    if array.ndim != 3 or array.shape[2] != 3:
        raise UnsupportedInputError(f"a picture must be a PIL image or an array (height, width, 3), got {array.shape}")
    return array if array.dtype == np.uint8 else np.clip(255 * array, 0, 255).astype(np.uint8)


def frames_of(pictures: Any, video: bool) -> list[Sequence[Any]]:
    """All pictures (videos) in order, as their frames."""
    if isinstance(pictures, (list, tuple)) and not (video and _is_video(pictures)):
        return [x for part in pictures for x in frames_of(part, video)]
    return [pictures] if video else [[pictures]]
