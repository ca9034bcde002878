"""Stage 1 while images are encoded: before a projector that works token by token, which removed tokens never enter.

What was chosen travels with the features; their number stays what transformers expects, and rows that were not
projected hold NaN, which nobody reads.
"""

import threading
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .attention import Attended, install_tap
from .choose import stage1, stage1_apart
from .compat import is_exporting, show_survivors
from .errors import UnsupportedInputError
from .install import Installation
from .merging import mixed
from .read import Chosen, Reader, State, chosen_of
from .registry import Parts
from .score import received_in_tower
from .select import take
from .settings import Settings
from .step import is_static_step
from .strategies import Reading


class EarlyStage(Reader):
    """The hooks that choose in the encoder, where the family's projector allows it."""

    def __init__(self, parts: Parts, state: State, settings: Settings) -> None:
        super().__init__(parts, state)
        self.settings = settings

    def install(self, on: Installation) -> None:
        """Put the hooks on the model."""
        super().install(on)
        if self.parts.projector is not None:
            on.before(self.parts.projector, self.before_projector)
            on.after(self.parts.projector, self.after_projector)
        for module, readings in self.settings.readings:
            whose = tuple(x for x in readings if x.of != "tokens")
            if whose:
                on.note(install_tap(module, partial(self.observe_vision, whose)))
            if whose != readings:
                on.before(module, partial(self.before_vision_layer, readings))

    def observe_vision(self, readings: tuple[Reading, ...], _: None, seen: Attended) -> None:
        """A vision layer's query and key (B, H, 1 + N, D), [CLS] first: what the scorer reads there, (B, N) each."""
        encoding = self._call().encoding
        if encoding is None:
            return
        with torch.no_grad():
            for reading in readings:
                encoding.attention[reading] = received_in_tower(seen.query, seen.key, seen.scaling, reading.of)

    def before_vision_layer(self, readings: tuple[Reading, ...], module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A vision layer's attention is given tokens (B, 1 + N, C), [CLS] first: what the scorer reads there."""
        encoding = self._call().encoding
        if encoding is not None:
            found = tokens_given(args, kwargs)
            encoding.attention.update({x: found for x in readings if x.of == "tokens"})

    @torch.compiler.disable
    def before_projector(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Stage 1: encoder features (B, N, C), or all images in one row (1, N1 + N2 + ..., C) -> those to project."""
        encoding = self._call().encoding
        if encoding is None:
            return None
        features = args[0]
        encoding.rows = None
        present = encoding.sizes or [features.shape[1]] * len(features)
        encoding.present += present
        if all(self.settings.budget(n).stage1 >= n for n in present):
            return None
        self._check_readings(encoding.arguments)
        if encoding.sizes is None:
            index, *about = stage1(self.settings, self.settings.scorer, features, encoding.attention)
            assert index is not None  # all images are of one size, at which some tokens go
            encoding.chosen += [
                Chosen(i, *(None if x is None else x[number] for x in about)) for number, i in enumerate(index)
            ]
            encoding.rows = index
            weights = about[1]
            left = take(features, index) if weights is None else mixed(features, weights)
        else:
            images = features.flatten(0, 1).split(encoding.sizes)
            chosen = [Chosen(*x) for x in stage1_apart(self.settings, self.settings.scorer, images)]
            encoding.chosen += chosen
            starts = np.cumsum([0, *encoding.sizes])[:-1].tolist()
            rows = [
                torch.arange(len(x), device=x.device) if c.rows is None else c.rows
                for x, c in zip(images, chosen, strict=True)
            ]
            encoding.rows = torch.cat([start + x for start, x in zip(starts, rows, strict=True)])[None]
            parts = [
                x[r] if c.weights is None else mixed(x[None], c.weights[None])[0]
                for x, r, c in zip(images, rows, chosen, strict=True)
            ]
            left = torch.cat(parts)[None]
        encoding.shape = features.shape[:2]
        return (left, *args[1:]), kwargs

    @torch.compiler.disable
    def after_projector(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        """(B, R1, D) projected survivors at their places among (B, N, D); the others, which nobody reads, hold NaN."""
        encoding = self._call().encoding
        if encoding is None or encoding.rows is None:
            return None
        rows = encoding.rows.to(output.device)[..., None].expand(-1, -1, output.shape[-1])
        return output.new_full((*encoding.shape, output.shape[-1]), torch.nan).scatter(1, rows, output)

    def _check_readings(self, arguments: dict[str, Any]) -> None:
        """[CLS] stands where the config says: a call must not say otherwise."""
        config = self.parts.base.config
        for name in ("vision_feature_layer", "vision_feature_select_strategy") if self.settings.scorer.reads else ():
            value, own = arguments.get(name), getattr(config, name, None)
            if value is not None and value != own:
                raise UnsupportedInputError(
                    f"scorer={self.settings.scorer.name!r} reads [CLS] where the config has it ({name}={own!r}), this "
                    f"call asks for {name}={value!r}: set it in the config before apply(), or use another scorer"
                )

    def show_kept(self, features: list[Tensor]) -> None:
        """Let the base's output, in this call alone, show the survivors of these features (N, D)."""
        chosen = [chosen_of(x) for x in features]
        if any(x.rows is not None for x in chosen):
            show = partial(self.after_base, threading.get_ident(), features, chosen)
            self.state.local.showing = self.parts.base.register_forward_hook(show)

    @torch.compiler.disable
    def after_base(
        self, thread: int, features: list[Tensor], chosen: list[Chosen], module: nn.Module, args: tuple, output: Any
    ) -> Any:
        """The features in the output are the survivors: the others were never projected."""
        if threading.get_ident() != thread:
            return None
        self._show_nothing()
        left = [
            x if c.rows is None else x.index_select(0, c.rows.to(x.device))
            for x, c in zip(features, chosen, strict=True)
        ]
        return show_survivors(output, features, left)

    def _show_nothing(self) -> None:
        local = self.state.local
        if local.showing is not None:
            local.showing.remove()
            local.showing = None

    def before_base(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward starts; one token on a static cache, which generate() compiles, shows nothing."""
        if is_static_step(args, kwargs):
            return
        self._show_nothing()
        _refuse_recording()
        super().before_base(module, args, kwargs)

    def before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Labels, and what generate() made."""
        if not is_static_step(args, kwargs):
            _refuse_recording()  # a strict export comes no further: dynamo must not look into what follows
            super().before_model(module, args, kwargs)


def tokens_given(args: tuple, kwargs: dict) -> Tensor:
    """What a vision layer's attention is given, without [CLS], which comes first: (B, N, C)."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return hidden[:, 1:].detach()


def _refuse_recording() -> None:
    if is_exporting():
        raise UnsupportedInputError(
            "torch.export and torch.jit.trace record one call, but a patched model decides in each call what to "
            "keep: export the model without the patch (lp_patch.remove(model))"
        )
