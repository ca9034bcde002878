"""Install, remove, look: the life of a patch on one model instance."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from .compat import merging_module
from .config import PruningConfig, make_config
from .install import Installation, forget_compiled, owner, unhook
from .pruner import WEIGHTS_FILE, LearnablePruner, find_pruner, resolve_pruner
from .registry import Parts, find_parts, unwrap
from .report import Report, make_report, part_costs
from .strategies import may_use_pruner
from .surgery import Surgery
from .trace import Trace


class Patch:
    """A patched model's handle: what was asked for, what was done, and the way back."""

    def __init__(self, parts: Parts, config: PruningConfig, pruner: LearnablePruner | None) -> None:
        self.config = config
        self._parts = parts
        self._surgery = Surgery(parts, config, pruner)
        fewest = None if parts.adapter.fewest is None else parts.adapter.fewest(parts.model.config)
        if fewest is not None:
            self._surgery.budget(fewest)  # refuses what no image could be pruned to
        self._surgery.patch = self
        self._installation = Installation()

    @property
    def trace(self) -> Trace | None:
        """What the latest prefill kept (this thread's, else any thread's); None before the first one."""
        record = self._surgery.record
        return None if record is None else record.trace()

    def report(self) -> Report:
        """What the latest prefill saved; print it, or read its fields."""
        parts, record, layer = self._parts, self._surgery.record, self._surgery.shape.layer
        tower = None if parts.adapter.tower is None else parts.adapter.tower(parts.base)
        trace, encoded = (None, []) if record is None else (record.trace(), record.encoded)
        model = parts.language_model
        return make_report(
            trace,
            parts.layers,
            model.config,
            model.dtype.itemsize,
            layer,
            part_costs(encoded, tower, parts.projector),
            {**asdict(self.config), "layer": layer, "scorer": self._surgery.scorer.name},
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the settings, and the pruner if there is one: `lp_patch.apply(model, folder)` patches alike."""
        self.config.save(folder)
        if self._surgery.pruner is not None:
            self._surgery.pruner.save_pretrained(folder)

    def remove(self) -> None:
        """Take everything back, bit for bit. Does nothing the second time."""
        if not self.active:
            return
        self._installation.remove()
        for module in self._parts.model.modules():
            unhook(module, self._surgery)
        forget_compiled(self._parts.model)

    @property
    def active(self) -> bool:
        """Whether the model is patched by this handle now."""
        return self._installation.active

    def __repr__(self) -> str:
        c, shape = self.config, self._surgery.shape
        budget = f"tokens={c.tokens}" if c.tokens is not None else f"ratio={c.ratio:.4g}"
        stages = f"{self._surgery.scorer.name!r} before the LLM"
        if c.stage_ratio > 1:
            stages += f", {c.text_scorer!r} after layer {shape.layer} of {shape.n_layers}"
        if shape.wipe_layer is not None:
            stages += f", none after layer {shape.wipe_layer}"
        state = "active" if self.active else "removed"
        return f"<lp_patch.Patch of {self._parts.adapter.family} ({state}): {budget}, {stages}>"

    def _install(self) -> None:
        try:
            self._surgery.install(self._installation)
        except BaseException:
            self.remove()
            raise
        forget_compiled(self._parts.model)


def _find(model: object) -> Patch | None:
    """The patch on a model, found by its own hooks, so that copies of the model know theirs."""
    base = merging_module(unwrap(model))
    for hook in getattr(base, "_forward_pre_hooks", {}).values():
        surgery = owner(hook)
        if isinstance(surgery, Surgery):
            return surgery.patch
    return None


def apply(
    model: nn.Module,
    config: PruningConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    pruner: LearnablePruner | str | Path | None = None,
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
    parts = find_parts(model)
    if look_up and may_use_pruner(settings.scorer):
        module = find_pruner(parts.model.config, parts.width)
    else:
        module = resolve_pruner(pruner, parts.width, parts.model.config)
    patch = Patch(parts, settings, module)
    earlier = _find(model)
    if earlier is not None:
        earlier.remove()
    patch._install()
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
    **options: Any,
) -> Iterator[Patch]:
    """`apply` for the length of a with block; removed at its end, exceptions included."""
    patch = apply(model, config, pruner=pruner, **options)
    try:
        yield patch
    finally:
        patch.remove()
