"""Install, remove, look: the life of a patch on one model instance."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .compat import merging_module
from .config import PruningConfig, make_config
from .engine import Engine
from .graphs import CompiledEngine
from .install import Installation, forget_compiled, owner, unhook
from .pruner import WEIGHTS_FILE, LearnablePruner, find_pruner, resolve_pruner
from .registry import Adapter, Parts, adapter_for, find_parts, unwrap
from .report import Report, make_report, part_costs
from .settings import Settings, resolve
from .strategies import may_use_pruner
from .trace import Trace


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
        parts, record, layer = self._parts, self._engine.record, self._settings.shape.layer
        tower = None if parts.adapter.tower is None else parts.adapter.tower(parts.base)
        trace, encoded = (None, []) if record is None else (record.trace(), record.encoded)
        model = parts.language_model
        return make_report(
            trace,
            parts.layers,
            model.config,
            model.dtype.itemsize,
            layer,
            parts.kinds,
            part_costs(encoded, tower, parts.projector),
            {**asdict(self.config), "layer": layer, "scorer": self._settings.scorer.name},
        )

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
        stages = f"{self._settings.scorer.name!r} before the LLM"
        if c.stage_ratio > 1:
            stages += f", {c.text_scorer!r} after layer {shape.layer} of {shape.n_layers}"
        if shape.wipe_layer is not None:
            stages += f", none after layer {shape.wipe_layer}"
        state = "active" if self.active else "removed"
        return f"<lp_patch.Patch of {self._parts.adapter.family} ({state}): {budget}, {stages}>"

    def _install(self) -> None:
        try:
            self._engine.install(self._installation)
        except BaseException:
            self.remove()
            raise
        forget_compiled(self._parts.model)


def declared(model: Any) -> Adapter:
    """The adapter of an unwrapped model, or the default declaration where that was just proven to fit."""
    adapter = adapter_for(model)
    if adapter is None:
        from .check import prove  # which patches a tiny twin of the model

        adapter = prove(model)
        warnings.warn(
            f"nobody has declared the model type {adapter.model_type!r}: the default declaration holds on a tiny model "
            "of the same config (lp_patch.check(model) shows how). What that cannot see: whether several runs of "
            "visual tokens are one picture, and whether some of them are line breaks",
            stacklevel=3,
        )
    return adapter


def _find(model: object) -> Patch | None:
    """The patch on a model, found by its own hooks, so that copies of the model know theirs."""
    base = merging_module(unwrap(model))
    for hook in getattr(base, "_forward_pre_hooks", {}).values():
        engine = owner(hook)
        if isinstance(engine, Engine):
            return engine.patch
    return None


def apply(
    model: nn.Module,
    config: PruningConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    pruner: LearnablePruner | str | Path | None = None,
    compile: bool = False,
    **options: Any,
) -> Patch:
    """Prune the visual tokens of this model from now on, in place. An earlier patch of ours on it is replaced.

    Args:
        model: a transformers vision-language model, also inside PEFT, `torch.compile` or DDP; only this instance
            changes.
        config: options as a `PruningConfig` or as a dict of its fields, or a folder that `Patch.save_pretrained`
            wrote: its settings, and its pruner if it holds one and none is given.
        pruner: trained stage-1 weights: a Hub id, a folder, or a `LearnablePruner`; one that was trained on another
            base warns. None: for a scorer that reads one, and for "auto", the pruner that belongs to the model's
            checkpoint, which is the folder ``lp_patch_pruner`` inside a local one, or a
            `lp_patch.pruner.KNOWN_PRUNERS` entry; without one "auto" is training-free. A settings folder without a
            pruner means none.
        compile: run the prefill in captured regions (CUDA graphs), where the host takes longer than the device: short
            prompts, batch 1. Each shape is captured at its first call, which takes about as long as five others; at
            most eight are kept, in memory of their own (`Patch.captured`). What does not fit (batches, padding,
            gradients) runs as without it, and says so once.
        options: fields of `PruningConfig`; they override `config`.

    Returns:
        The handle: `trace`, `report()`, `remove()`.

    Raises:
        ConfigError: an option is misspelt or out of range.
        UnsupportedModelError: no adapter fits, or a declared patch point is missing.
        PrunerError: the pruner cannot be loaded or reads another width.
    """
    look_up = pruner is None
    if isinstance(config, (str, Path)):
        look_up = False  # these settings ran with the folder's pruner, or without any
        folder = Path(config)
        config = PruningConfig.load(folder)
        if pruner is None and (folder / WEIGHTS_FILE).exists():
            pruner = folder
    settings = make_config(config, options)
    parts = find_parts(model, declared(unwrap(model)))
    if look_up and may_use_pruner(settings.scorer):
        module = find_pruner(parts.model.config, parts.width)
    else:
        module = resolve_pruner(pruner, parts.width, parts.model.config)
    patch = Patch(parts, resolve(parts, settings, module), compile)
    earlier = _find(model)
    if earlier is not None:
        earlier.remove()
    patch._install()
    if not hasattr(parts.model, "generate"):
        warnings.warn(
            f"{type(parts.model).__name__} is patched without its head: where a whole model generates with it, "
            "lp_patch cannot tell the prompt from what was generated, which then asks too (without a cache, and "
            "guesses of assisted decoding). To generate, patch the whole model",
            stacklevel=2,
        )
    return patch


def remove(model: nn.Module) -> None:
    """Take our patch off a model, bit for bit; does nothing where there is none."""
    patch = _find(model)
    if patch is not None:
        patch.remove()


def is_applied(model: nn.Module) -> bool:
    """Whether the model carries a patch of ours."""
    return _find(model) is not None


@contextmanager
def applied(
    model: nn.Module,
    config: PruningConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    pruner: LearnablePruner | str | Path | None = None,
    compile: bool = False,
    **options: Any,
) -> Iterator[Patch]:
    """`apply` for the length of a with block; removed at its end, exceptions included."""
    patch = apply(model, config, pruner=pruner, compile=compile, **options)
    try:
        yield patch
    finally:
        patch.remove()
