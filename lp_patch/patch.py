"""Install, remove, look: the life of a patch on one model instance."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .check import prove
from .compat import merging_module
from .config import Options, PruningConfig, make_config, shows_options
from .engine import Engine
from .handle import Patch
from .install import owner
from .pruner import WEIGHTS_FILE, Pruner, find_pruner, resolve_pruner
from .recommend import recommended
from .registry import Adapter, adapter_for, find_parts, unwrap
from .settings import resolve
from .strategies import may_use_pruner, resolve_scorer

if TYPE_CHECKING:
    from typing_extensions import Unpack


def declared(model: Any) -> Adapter:
    """The adapter of an unwrapped model, or the default declaration where that was just proven to fit."""
    adapter = adapter_for(model)
    if adapter is None:
        adapter = prove(model)
        warnings.warn(
            f"nobody has declared the model type {adapter.model_type!r}: the default declaration holds on a tiny model "
            "of the same config (lp_patch.check(model) shows how). What that cannot see: whether several runs of "
            "visual tokens are one picture, and whether some of them are line breaks",
            stacklevel=3,
        )
    return adapter


def find_patch(model: object) -> Patch | None:
    """The patch on a model, found by its own hooks, so that copies of the model know theirs."""
    base = merging_module(unwrap(model))
    for hook in getattr(base, "_forward_pre_hooks", {}).values():
        engine = owner(hook)
        if isinstance(engine, Engine):
            return engine.patch
    return None


@shows_options
def apply(
    model: nn.Module,
    config: PruningConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    pruner: Pruner | str | Path | None = None,
    compile: bool = False,
    **options: "Unpack[Options]",
) -> Patch:
    """Prune the visual tokens of this model from now on, in place. An earlier patch of ours on it is replaced.

    Args:
        model: a transformers vision-language model, also inside PEFT, `torch.compile` or DDP; only this instance
            changes.
        config: options as a `PruningConfig` or as a dict of its fields, or a folder that `Patch.save_pretrained`
            wrote: its settings, and its pruner if it holds one and none is given.
        pruner: trained stage-1 weights: a Hub id, a folder, or a `LearnablePruner` (or another
            kind, see `lp_patch.strategies`); one that was trained on another
            base warns. None: for a scorer that reads one, and for "auto", the pruner that belongs to the model's
            checkpoint, which is the folder ``lp_patch_pruner`` inside a local one, or a
            `lp_patch.pruner.KNOWN_PRUNERS` entry; without one "auto" is training-free. A settings folder without a
            pruner means none. Where it recommends `layer`, `stage_ratio` and `rounding` for this strategy and this very
            budget, they are taken, unless `config` is a whole `PruningConfig` or a folder, or one of these or
            `final_wipe_layer` is named.
        compile: run the prefill in captured regions (CUDA graphs), where the host takes longer than the device: short
            prompts, batch 1. Each shape is captured at its first call, which takes about as long as six others; at
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
    # a whole config, or a folder's, leaves nothing open
    whole = config is not None and not isinstance(config, Mapping)
    named = {*options, *(config if isinstance(config, Mapping) else ())}
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
    if module is not None and not whole:
        settings = recommended(settings, module.recommended, resolve_scorer(settings.scorer, module).name, named)
    patch = Patch(parts, resolve(parts, settings, module), compile)
    earlier = find_patch(model)
    if earlier is not None:
        earlier.remove()
    patch.put_back()
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
    patch = find_patch(model)
    if patch is not None:
        patch.remove()


def is_applied(model: nn.Module) -> bool:
    """Whether the model carries a patch of ours."""
    return find_patch(model) is not None


@shows_options
@contextmanager
def applied(
    model: nn.Module,
    config: PruningConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    pruner: Pruner | str | Path | None = None,
    compile: bool = False,
    **options: "Unpack[Options]",
) -> Iterator[Patch]:
    """`apply` for the length of a with block; removed at its end, exceptions included."""
    patch = apply(model, config, pruner=pruner, compile=compile, **options)
    try:
        yield patch
    finally:
        patch.remove()
