"""Install, remove, look: the life of a patch on one model instance."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import wrapt
from torch import nn

from .attention import install_tap
from .compat import PREFILL_METHODS, merging_module
from .config import PruningConfig, make_config
from .pruner import WEIGHTS_FILE, LearnablePruner, resolve_pruner
from .registry import Parts, find_parts, unwrap
from .report import Report, make_report
from .surgery import Surgery
from .trace import Trace


class MethodWrapper(wrapt.FunctionWrapper):
    """A wrapped method of one instance that can be copied and pickled with it."""

    def __deepcopy__(self, memo: dict) -> "MethodWrapper":
        return MethodWrapper(deepcopy(self.__wrapped__, memo), deepcopy(self._self_wrapper, memo))

    def __copy__(self) -> "MethodWrapper":
        return MethodWrapper(self.__wrapped__, self._self_wrapper)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return MethodWrapper, (self.__wrapped__, self._self_wrapper)


class Patch:
    """A patched model's handle: what was asked for, what was done, and the way back."""

    def __init__(self, parts: Parts, config: PruningConfig, pruner: LearnablePruner | None) -> None:
        self.config = config
        self._parts = parts
        self._surgery = Surgery(parts, config, pruner)
        self._surgery.patch = self
        self._undo: list[Callable[[], None]] = []

    @property
    def trace(self) -> Trace | None:
        """What the latest prefill kept (this thread's, else any thread's); None before the first one."""
        record = self._surgery.record
        return None if record is None else record.trace()

    def report(self) -> Report:
        """What the latest prefill saved; print it, or read its fields."""
        model = self._parts.language_model
        return make_report(
            self.trace, self._parts.layers, model.config, model.dtype.itemsize, self._surgery.shape.layer
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the settings, and the pruner if there is one: `lp_patch.apply(model, folder)` patches alike."""
        self.config.save(folder)
        if self._surgery.pruner is not None:
            self._surgery.pruner.save_pretrained(folder)

    def remove(self) -> None:
        """Take everything back, bit for bit. Does nothing the second time."""
        if not self._undo:
            return
        while self._undo:
            self._undo.pop()()
        for module in self._parts.model.modules():
            _unhook(module, self._surgery)
        _forget_compiled()

    @property
    def active(self) -> bool:
        """Whether the model is patched by this handle now."""
        return bool(self._undo)

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
        surgery, parts = self._surgery, self._parts
        try:
            for modality in parts.modalities:
                self._wrap(parts.base, modality.encode, partial(surgery.around_encode, modality.name))
            if parts.adapter.merge is not None:
                self._wrap(parts.base, parts.adapter.merge, surgery.around_merge)
            for name in PREFILL_METHODS:
                if hasattr(parts.model, name):
                    self._wrap(parts.model, name, surgery.around_prefill)
            if hasattr(parts.model, "_get_candidate_generator"):
                self._wrap(parts.model, "_get_candidate_generator", surgery.around_candidates)
                self._hook(parts.model.register_forward_pre_hook(surgery.before_model, with_kwargs=True))
            if parts.projector is not None:
                self._hook(parts.projector.register_forward_pre_hook(surgery.before_projector))
                self._hook(parts.projector.register_forward_hook(surgery.after_projector))
            self._hook(parts.base.register_forward_pre_hook(surgery.before_base, with_kwargs=True))
            self._hook(parts.base.register_forward_hook(surgery.after_base, with_kwargs=True))
            model = parts.language_model
            self._hook(model.register_forward_pre_hook(surgery.before_language_model, with_kwargs=True))
            self._hook(model.register_forward_hook(surgery.after_language_model, with_kwargs=True))
            self._hook(parts.rotary.register_forward_pre_hook(surgery.before_rotary, with_kwargs=True))
            for index, layer in enumerate(parts.layers):
                hook = partial(surgery.before_layer, index)
                self._hook(layer.register_forward_pre_hook(hook, with_kwargs=True))
            for attention, observer in surgery.taps():
                self._undo.append(install_tap(attention, observer))
        except BaseException:
            self.remove()
            raise
        _forget_compiled()

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _wrap(self, module: nn.Module, name: str, wrapper: Callable) -> None:
        """Wrap a non-forward method on the instance; undone by what its `__dict__` held before."""
        before = module.__dict__.get(name)
        setattr(module, name, MethodWrapper(getattr(module, name), wrapper))
        self._undo.append(partial(_restore, module, name, before))


def _owner(hook: Any) -> Any:
    """The object whose method a hook is, also with arguments bound."""
    return getattr(getattr(hook, "func", hook), "__self__", None)


def _unhook(module: nn.Module, surgery: Surgery) -> None:
    """Take our hooks off a module that was copied with them (PEFT's modules_to_save): no handle knows it."""
    for hooks, extra in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if _owner(hook) is surgery]:
            del hooks[key]
            extra.pop(key, None)


def _restore(module: nn.Module, name: str, before: Any) -> None:
    if before is None:
        delattr(module, name)
    else:
        setattr(module, name, before)


def _forget_compiled() -> None:
    # a model compiled before a hook came or went would silently run without noticing
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _find(model: object) -> Patch | None:
    """The patch on a model, found by its own hooks, so that copies of the model know theirs."""
    base = merging_module(unwrap(model))
    for hook in getattr(base, "_forward_pre_hooks", {}).values():
        owner = _owner(hook)
        if isinstance(owner, Surgery):
            return owner.patch
    return None


def apply(
    model: nn.Module,
    config: PruningConfig | str | Path | None = None,
    *,
    pruner: LearnablePruner | str | Path | None = None,
    **options: Any,
) -> Patch:
    """Prune the visual tokens of this model from now on, in place. An earlier patch of ours on it is replaced.

    Args:
        model: a transformers vision-language model, also inside PEFT, `torch.compile` or DDP; only this instance
            changes.
        config: options as a `PruningConfig`, or a folder that `Patch.save_pretrained` wrote: its settings, and its
            pruner if it holds one and none is given.
        pruner: trained stage-1 weights: a Hub id, a folder, or a `LearnablePruner`. None: training-free.
        options: fields of `PruningConfig`; they override `config`.

    Returns:
        The handle: `trace`, `report()`, `remove()`.

    Raises:
        ConfigError: an option is misspelt or out of range.
        UnsupportedModelError: no adapter fits, or a declared patch point is missing.
        PrunerError: the pruner cannot be loaded or reads another width.
    """
    if isinstance(config, (str, Path)):
        folder = Path(config)
        config = PruningConfig.load(folder)
        if pruner is None and (folder / WEIGHTS_FILE).exists():
            pruner = folder
    settings = make_config(config, options)
    parts = find_parts(model)
    patch = Patch(parts, settings, resolve_pruner(pruner, parts.width))
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
    config: PruningConfig | str | Path | None = None,
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
