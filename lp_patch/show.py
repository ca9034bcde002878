"""Pictures of what was kept: `Patch.show`, and the panels that it is made of."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .colours import BLUE, VERMILION
from .errors import MissingExtraError, UnsupportedInputError, UnsupportedModelError
from .locate import Located, frame_array, frames_of, locate, shapes_of
from .registry import Parts
from .trace import Record

if TYPE_CHECKING:
    from PIL.Image import Image

INK, MUTED, STAGE_1, STAGE_2 = "#1a1a1a", "#6b6b6b", BLUE, VERMILION
SIDE = 512  # pixels of a panel's longer side
FRAMES = 8  # of a video that are drawn


@dataclass(frozen=True)
class Panel:
    """One picture of a figure.

    Attributes:
        title: above it, on the left; `note`: on the right; `captions`: below it.
        picture: (H, W, 3) uint8.
        boxes: (n, 4), the tokens shown, left, top, right, bottom as shares of the picture; None: the picture alone.
        values: (n,) what colour each has; None: what no box covers is faded.
    """

    title: str
    picture: np.ndarray
    note: str = ""
    boxes: np.ndarray | None = None
    values: np.ndarray | None = None
    colour: str = INK
    captions: tuple[str, ...] = field(default=())


def need(package: str, extra: str = "show") -> None:
    """Refuse what cannot be done without a package of an extra.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        __import__(package)
    except ImportError as error:
        raise MissingExtraError(f'this needs {package}: pip install "lp_patch[{extra}]"') from error


def panels(
    parts: Parts,
    record: Record | None,
    images: Any = None,
    videos: Any = None,
    processor: Any = None,
    **options: Any,
) -> list[list[Panel]]:
    """A row of panels for each picture (and for frames of each video) of the latest prefill: see `Patch.show`."""
    need("PIL")
    if record is None or not record.visual.any():
        raise UnsupportedInputError("nothing to show: run the patched model on a prompt with pictures first")
    if images is None and videos is None:
        raise UnsupportedInputError("show() needs the pictures that the latest prefill saw: show(images), or videos=")
    adapter, trace = parts.adapter, record.trace()
    if adapter.layout is None:
        raise UnsupportedModelError(
            f"where the visual tokens of {adapter.family} lie in a picture is not known, or they lie in no one place "
            "(learnt queries): patch.trace has their numbers and scores"
        )
    processor = processor if processor is not None else own_processor(parts.model)
    found: list[list[Panel]] = []
    for name, given in (("image", images), ("video", videos)):
        if given is None:
            continue
        video = name == "video"
        mask = record.modalities.get(name)
        if mask is None or not mask.any():
            raise UnsupportedInputError(f"the latest prefill saw no {name}s: leave them out")
        shapes = shapes_of(given, video)
        process = partial(_process, processor, video, options)
        located = locate(parts.base, adapter.layout, process, shapes, int(mask.sum()), video)
        numbers = record.visual.cumsum(axis=1) - 1
        rows, columns = mask.nonzero()
        tokens = [torch.from_numpy(numbers[row, columns[rows == row]]) for row in range(len(mask))]
        pieces = [torch.from_numpy(rows == row) for row in range(len(mask))]
        shown = [(row, _part(located, piece), own) for row, (piece, own) in enumerate(zip(pieces, tokens, strict=True))]
        for picture, frames in enumerate(frames_of(given, video)):
            for frame in _spread(len(frames)):
                pixels = _shrunk(frame_array(frames[frame]))
                for row, place, own in shown:
                    here = (place.picture == picture) & (place.frame == frame)
                    if here.any():
                        found.append(_row(trace, row, own[here], place.box[here].numpy(), pixels))
                        label = [f"prompt {row + 1}"] * (len(mask) > 1) + [f"frame {frame + 1}"] * video
                        found[-1][0] = replace(found[-1][0], captions=tuple(label))
    return found


def own_processor(model: Any) -> Any:
    """The processor in the model's checkpoint, from this machine's disk."""
    from transformers import AutoProcessor

    name = getattr(model, "name_or_path", "")
    try:
        if not name:
            raise OSError("the model came of no checkpoint")
        return AutoProcessor.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise UnsupportedInputError(
            f"show() needs the processor that prepared the pictures: show(images, processor=processor) ({error})"
        ) from error


def _process(processor: Any, video: bool, options: dict[str, Any], pictures: Any) -> Any:
    name = "video_processor" if video else "image_processor"
    part = getattr(processor, name, None)
    if part is None:
        raise UnsupportedInputError(f"the processor {type(processor).__name__} has no {name}, which show() asks")
    return part(pictures, return_tensors="pt", **options)


def _part(located: Located, where: Tensor) -> Located:
    return Located(located.picture[where], located.frame[where], located.box[where])


def _spread(count: int) -> list[int]:
    """Numbers of at most FRAMES frames of so many."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(count, FRAMES))})


def _row(trace: Any, row: int, own: Tensor, boxes: np.ndarray, picture: np.ndarray) -> list[Panel]:
    """The panels of one picture, whose tokens are `own` (n,) of the row's, at `boxes` (n, 4)."""
    found = [Panel("Picture", picture, f"{len(own)} tokens")]
    for number, colour in ((1, STAGE_1), (2, STAGE_2)):
        kept, scores = getattr(trace, f"stage{number}")[row], getattr(trace, f"stage{number}_scores")[row]
        before = torch.arange(trace.visual_tokens[row]) if number == 1 else trace.stage1[row]
        if scores is not None and len(scores):
            full = torch.full((trace.visual_tokens[row],), torch.nan).index_copy(0, before, scores)
            values = full[own].numpy()
            there = ~np.isnan(values)
            panel = Panel(f"Stage {number}, scores", picture, boxes=boxes[there], values=values[there], colour=colour)
            found.append(
                replace(panel, note=f"{values[there].min():.2g} to {values[there].max():.2g}") if there.any() else panel
            )
        stays, how = torch.isin(own, kept).numpy(), "kept"
        if trace.mixtures[row] is not None:  # no token stays as it was: how much of each is in those that stand here
            mixed, how = trace.mixtures[row][torch.isin(trace.stage1[row], kept[torch.isin(kept, own)])], "mixtures"
            title = f"Stage {number}, share in mixtures"
            found.append(Panel(title, picture, boxes=boxes, values=mixed.sum(dim=0)[own].numpy(), colour=colour))
        found.append(Panel(f"Stage {number}", picture, f"{stays.sum()} {how}", boxes[stays], colour=colour))
    return found


def _shrunk(picture: np.ndarray) -> np.ndarray:
    """The picture with its longer side of SIDE pixels."""
    from PIL import Image

    height, width = picture.shape[:2]
    factor = SIDE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def draw(grid: Sequence[Sequence[Panel]], title: str = "", path: str | Path | None = None) -> "Image":
    """Rows of panels as one picture; also written to `path`, if given."""
    need("matplotlib")
    from matplotlib.figure import Figure

    side, gap, head, line = 1.9, 0.16, 0.30, 0.15  # inches
    columns = max(len(row) for row in grid)
    heights = [max(side * p.picture.shape[0] / max(p.picture.shape[:2]) for p in row) for row in grid]
    wrapped = [[[y for x in p.captions for y in textwrap.wrap(x, 32)] for p in row] for row in grid]
    feet = [0.08 + line * max(map(len, row)) for row in wrapped]
    above = 0.2 if title else 0.0
    width, height = columns * (side + gap) + gap, sum(heights) + sum(feet) + head * len(grid) + gap + above
    figure = Figure(figsize=(width, height), dpi=200, facecolor="white")
    if title:
        figure.text(gap / width, 1 - 0.10 / height, title, va="top", fontsize=9, color=INK)
    top = height - above
    for row, captions, tall, foot in zip(grid, wrapped, heights, feet, strict=True):
        top -= head
        for column, panel in enumerate(row):
            left = gap + column * (side + gap)
            shape = np.array(panel.picture.shape[:2]) * side / max(panel.picture.shape[:2])
            axes = figure.add_axes((left / width, (top - shape[0]) / height, shape[1] / width, shape[0] / height))
            _draw_panel(axes, panel)
            over = (top + 0.05) / height
            figure.text(left / width, over, panel.title, fontsize=7.5, weight="bold", color=panel.colour)
            figure.text((left + side) / width, over, panel.note, fontsize=7.5, ha="right", color=MUTED)
            for i, text in enumerate(captions[column]):
                figure.text(left / width, (top - tall - 0.06 - i * line) / height, text, fontsize=7.5, va="top")
        top -= tall + foot
    return rendered(figure, path)


def rendered(figure: Any, path: str | Path | None = None) -> "Image":
    """A matplotlib figure as a PIL image, which notebooks display; also written to `path`, if given."""
    need("PIL")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path, dpi=(figure.dpi, figure.dpi))
    return image


def _draw_panel(axes: Any, panel: Panel) -> None:
    axes.set_axis_off()
    picture = panel.picture / 255
    if panel.boxes is None:
        axes.imshow(picture)
        return
    height, width = picture.shape[:2]
    faded = (0.8 + 0.2 * picture.mean(axis=-1, keepdims=True)).repeat(3, axis=-1)
    edges = np.nan_to_num(panel.boxes) * np.array([width, height, width, height])
    bounds = edges.round().astype(int)
    covered = np.zeros((height, width), dtype=bool)
    if panel.values is None:
        for left, top, right, bottom in bounds:
            covered[top:bottom, left:right] = True
        axes.imshow(np.where(covered[..., None], picture, faded))
        if covered.any() and not covered.all():
            axes.contour(covered, [0.5], colors=panel.colour, linewidths=0.8)
        return
    # small tokens over large ones, such as tiles over the small copy of the picture
    shown = np.full((height, width), np.nan)
    for i in np.argsort(-(bounds[:, 2] - bounds[:, 0]) * (bounds[:, 3] - bounds[:, 1]), kind="stable"):
        left, top, right, bottom = bounds[i]
        shown[top:bottom, left:right] = panel.values[i]
    high = np.quantile(panel.values, 0.95) if len(panel.values) else 1.0  # a few sinks must not darken all else
    axes.imshow(faded)
    axes.imshow(np.ma.masked_invalid(shown), cmap="viridis", vmax=high, alpha=0.85, interpolation="nearest")
