"""The handle of one patch on one model: what was asked for, what was done, and the way back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .budget import StageBudget
from .engine import Engine
from .graphs import CompiledEngine
from .install import Installation, forget_compiled, unhook
from .registry import Parts
from .report import Report, make_report, part_costs
from .settings import Settings
from .show import Panel, draw, panels
from .trace import Trace

if TYPE_CHECKING:
    from PIL.Image import Image


class Patch:
    """A patched model's handle: what was asked for, what was done, and the way back.

    A pruned forward's `hidden_states` are given back in the input's length, as copies made of what the layers ran on:
    `retain_grad()` on them finds no gradient. Take it in a hook of the layer.
    """

    def __init__(self, parts: Parts, settings: Settings, compile: bool = False) -> None:
        self.config = settings.config
        self._parts = parts
        self._settings = settings
        self._engine = (CompiledEngine if compile else Engine)(parts, settings)
        self._engine.patch = self
        self._installation = Installation()

    @property
    def trace(self) -> Trace | None:
        """What the latest prefill kept (this thread's, else any thread's); None before the first one."""
        record = self._engine.record
        return None if record is None else record.trace()

    def report(self) -> Report:
        """What the latest prefill saved; print it, or read its fields."""
        parts, record, shape = self._parts, self._engine.record, self._settings.shape
        settings = {**asdict(self.config), "layer": shape.layer, "scorer": self._settings.scorer.name}
        stage_1 = shape.layer
        if self.config.stage_ratio == 1:
            stage_1 = shape.wipe_layer or shape.n_layers
            settings |= {"layer": None, "text_scorer": None}
        tower = None if parts.adapter.tower is None else parts.adapter.tower(parts.base)
        trace, encoded = (None, []) if record is None else (record.trace(), record.encoded)
        model = parts.language_model
        return make_report(
            trace,
            parts.layers,
            model.config,
            model.dtype.itemsize,
            stage_1,
            parts.kinds,
            part_costs(encoded, tower, parts.projector),
            settings,
        )

    def show(
        self,
        images: Any = None,
        *,
        videos: Any = None,
        processor: Any = None,
        title: str = "",
        path: str | Path | None = None,
        **options: Any,
    ) -> "Image":
        """A picture of what each stage of the latest prefill kept and why, one row for each picture that it saw.

        Each row has the picture, what stage 1 kept, what stage 2 kept, and before each, where the strategy has any, its
        scores, from dark to light; the 5 % highest have one colour. Where tokens of several sizes lie over one another
        (tiles and a small copy), the smaller ones are on top, and a place is kept if any of them is.

        Args:
            images: all pictures of that prefill, PIL or (height, width, 3) arrays, in lists as the processor was given
                them; one picture may stand alone.
            videos: its videos, each its frames as a list of pictures or a (frames, height, width, 3) array; at most
                8 frames of each are drawn.
            processor: what prepared them. None: the one in the model's checkpoint, if that is on this machine.
            title: a line above, such as the question.
            path: a file to write the picture to as well.
            options: the ones that the processor's call was given for pictures, such as `max_pixels`.

        Returns:
            A PIL image, which notebooks display.

        Raises:
            UnsupportedInputError: nothing was pruned yet, or the processor makes other tokens of these pictures.
            UnsupportedModelError: where this family's tokens lie is not known.
            MissingExtraError: `lp_patch[show]` is not installed.
        """
        return draw(self.panels(images, videos=videos, processor=processor, **options), title, path)

    def panels(
        self, images: Any = None, *, videos: Any = None, processor: Any = None, **options: Any
    ) -> list[list[Panel]]:
        """What `show` draws, to arrange anew and give to `lp_patch.show.draw`: rows of panels."""
        return panels(self._parts, self._engine.record, images, videos, processor, **options)

    @contextmanager
    def asking(self, mask: Tensor) -> Iterator[None]:
        """Within the block, and in this thread, only these tokens of a prompt may ask in stage 2.

        By default all text after the last image asks, but for tokens that `labels` mark as answers and for what
        `generate()` made. A mask serves whoever re-sends a whole conversation (only the last turn asks) or scores
        answers without labels.

        Args:
            mask: (B, S) bool, the prompts' tokens; in `generate()` what is generated never asks.
        """
        with self._engine.asking(mask):
            yield

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the settings, and the pruner if there is one: `lp_patch.apply(model, folder)` patches alike."""
        self.config.save(folder)
        if self._settings.pruner is not None:
            self._settings.pruner.save_pretrained(folder)

    def remove(self) -> None:
        """Take everything back, bit for bit. Does nothing the second time."""
        if not self.active:
            return
        self._installation.remove()
        for module in self._parts.model.modules():
            unhook(module, self._engine)
        forget_compiled(self._parts.model)

    def budget(self, visual_tokens: int) -> StageBudget:
        """What a picture of so many visual tokens keeps after each stage."""
        return self._settings.budget(visual_tokens)

    @property
    def cuts(self) -> tuple[int, int]:
        """Decoder layers in all, and those that run on the stage-1 tokens."""
        return self._settings.shape.n_layers, self._settings.shape.layer

    @property
    def captured(self) -> dict[str, int]:
        """With `compile=True`: how many regions are captured, and the device memory in bytes that they hold."""
        engine = self._engine
        if not isinstance(engine, CompiledEngine):
            return {"regions": 0, "bytes": 0}
        regions = [*engine.encoders.kept.values(), *engine.languages.kept.values()]
        return {"regions": len(regions), "bytes": sum(x.bytes for x in regions)}

    @property
    def active(self) -> bool:
        """Whether the model is patched by this handle now."""
        return self._installation.active

    def __repr__(self) -> str:
        c, shape = self.config, self._settings.shape
        budget = f"tokens={c.tokens}" if c.tokens is not None else f"ratio={c.ratio:.4g}"
        budget += ", rounded down" if c.rounding == "down" else ""
        stages = f"{self._settings.scorer.name!r} before the LLM"
        if c.stage_ratio > 1:
            stages += f", {c.text_scorer!r} after layer {shape.layer} of {shape.n_layers} at {c.stage_ratio:g} : 1"
        if shape.wipe_layer is not None:
            stages += f", none after layer {shape.wipe_layer}"
        state = "active" if self.active else "removed"
        return f"<lp_patch.Patch of {self._parts.adapter.family} ({state}): {budget}, {stages}>"

    def put_back(self) -> None:
        """Put the patch on its model, which carries none of ours: after `remove`, the same one again."""
        self._engine.state.held = False  # hooks that stay on a static cache's account went with `remove`
        try:
            self._engine.install(self._installation)
        except BaseException:
            self.remove()
            raise
        forget_compiled(self._parts.model)
