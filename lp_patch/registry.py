"""Adapters: what lp_patch must know about a model family, as data, keyed by `config.model_type`."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points, version
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from .compat import (
    KEYLESS,
    computes_with,
    installed,
    kind_of,
    makes_masks,
    merging_module,
    shares_keys,
    takes_over,
    window,
)
from .errors import ConfigError, UnsupportedModelError
from .layout import Layout
from .unfit import UNFIT

ENTRY_POINT_GROUP = "lp_patch.adapters"


# built-in types that work with transformers back to 4.57; the others were tried from NEWER on
TRIED_BEFORE = frozenset(
    {
        *("llava", "llava_next", "llava_next_video", "llava_onevision", "video_llava", "llava_llama", "internvl"),
        *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "idefics3", "smolvlm", "mistral3"),
    }
)
NEWER = (5, 23)


class Modality(NamedTuple):
    """A kind of visual input.

    Attributes:
        name: as transformers names it in `mm_encoder_outputs`.
        encode: method of the merging module that returns its features as `pooler_output`.
        placeholder: config field with the id of the token which a feature replaces, or that id.
    """

    name: str
    encode: str
    placeholder: str | int


IMAGE = Modality("image", "get_image_features", "image_token_id")
VIDEO = Modality("video", "get_video_features", "video_token_id")


@dataclass(frozen=True)
class Adapter:
    """Patch points of one model type. Every path is dotted and starts at the module that merges image and text.

    Attributes:
        model_type: `config.model_type` of the whole model.
        family: the name that users know it by.
        modalities: what it sees.
        merge: method of the whole model that puts encoded features (F, N, D) in the place of single placeholders of its
            `input_ids`; the merged embeddings (B, S, D) are the one 3-D tensor of what it returns. Paths then start at
            the whole model. None: the forward of the model without its head merges, a feature row per placeholder.
        projector: module that maps encoder features (B, N, C) token by token to the language model's width; stage 1
            prunes before it. None where none does so (mergers, tilings): stage 1 then prunes the projected features.
        pictures: (merging module, arguments of the encoding method by name) -> tokens of each image in the projector's
            input, in order, where the rows there are not one image each; or None where they are. What it answers is
            checked against the features that come out.
        width: from the model's config, the width of the features that stage 1 reads; None: the language model's.
        structural: (merging module, embeddings (B, S, D)) -> (B, S) bool, rows that carry no picture (line breaks of
            a tiling): kept and not counted.
        merge_adjacent: features that follow one another without a token between are parts of one image (tiles) or
            video (frames), and share its budget; or the names of the modalities of which this holds.
        split: (ids (S,), positions (n,) of one feature's tokens) of a row -> how many of them each image has, in order;
            where the encoder returns a row's images as one feature. None: a feature is an image.
        tower: from the merging module, the vision tower, where each token attends to all of its picture, tile or frame,
            a row of (B, T, C): reports count its arithmetic. None, or a function that returns it: they do not.
        first_cut: from the model's config, how many decoder layers must run before stage 2 may cut; None: one.
        fewest: from the model's config, the fewest visual tokens that an image or video can have: a budget that none
            could be pruned to is refused at once. None, or a function that returns it: the config does not tell.
        layout: what lies under each visual token, a function of `layout.Pixels`, for pictures of what was kept; None:
            not known, or not in one place.
        vision_attention: from the merging module, the attention modules of the vision layers up to the one whose output
            the features are, in order; None where the family has no [CLS], first of its tokens and cut off, whose
            other tokens are the projector's input one to one.
        language_model: module that runs the decoder layers and returns `last_hidden_state`.
        layers: the decoder layers, in order.
        attention: path from a decoder layer to its attention module.
        rotary: module called with `position_ids` once per forward; None where the layers have no rotary embedding.
        per_token: further arguments of the language model, and of its layers, that hold a row for each token,
            (B, S, ...): they are cut with the sequence.
        streams: hidden states between the layers are several streams of the tokens, (A, B, S, D).
        blanks: images (B, N, ...) that are all zeros are padding, which the model looks for and leaves out.
    """

    model_type: str
    family: str
    modalities: tuple[Modality, ...] = (IMAGE,)
    merge: str | None = None
    projector: str | None = None
    pictures: Callable[[Any, dict[str, Any]], list[int] | None] | None = None
    width: Callable[[Any], int] | None = None
    structural: Callable[[Any, Tensor], Tensor] | None = None
    merge_adjacent: bool | tuple[str, ...] = False
    split: Callable[[Tensor, Tensor], list[int]] | None = None
    tower: Callable[[Any], nn.Module | None] | None = None
    first_cut: Callable[[Any], int] | None = None
    fewest: Callable[[Any], int | None] | None = None
    layout: Layout | None = None
    vision_attention: Callable[[Any], list[nn.Module]] | None = None
    language_model: str = "language_model"
    layers: str = "language_model.layers"
    attention: str = "self_attn"
    rotary: str | None = "language_model.rotary_emb"
    per_token: tuple[str, ...] = ()
    streams: bool = False
    blanks: bool = False


# what a decoder layer may look at: all tokens before it; those that its mask says (windows, chunks, blocks); or it has
# no keys, but a state that runs along (linear attention, convolution)
FULL, MASKED, RECURRENT = "full", "masked", "recurrent"


@dataclass(frozen=True)
class Kinds:
    """What the decoder layers of one model look at.

    Attributes:
        names: FULL, MASKED or RECURRENT, by layer.
        windows: by layer, how many keys back it looks, or None where it does not count them.
        sources: by layer, the layer whose keys it attends to: itself, or an earlier one that it shares them with.
        joined: by layer, whether it takes over which keys an earlier one picked: no cut may come between.
    """

    names: tuple[str, ...]
    windows: tuple[int | None, ...]
    sources: tuple[int, ...]
    joined: tuple[bool, ...]

    @property
    def plain(self) -> bool:
        """Whether all layers look at all tokens before them."""
        return set(self.names) == {FULL}

    @property
    def masked(self) -> bool:
        """Whether some layer's mask says what it looks at."""
        return MASKED in self.names

    @cached_property
    def first(self) -> int:
        """The first layer with keys."""
        return next(i for i, name in enumerate(self.names) if name != RECURRENT)

    @property
    def last_cut(self) -> int:
        """The last layer before which the sequence may be cut: those that share keys need them as long as theirs."""
        return min((s for i, s in enumerate(self.sources) if s != i), default=len(self.names))

    def reached(self, length: int) -> bool:
        """Whether masks matter in a sequence of so many tokens."""
        return length > self._reach

    @cached_property
    def _reach(self) -> float:
        """The smallest window; 0 where a mask counts none, and no end where no mask matters."""
        return min(
            (x or 0 for name, x in zip(self.names, self.windows, strict=True) if name == MASKED), default=math.inf
        )

    def scoring(self) -> list[int]:
        """Layers, counted from 1, whose attention can rank tokens: those that see all of them, if there are any."""
        wanted = FULL if FULL in self.names else MASKED
        own = [i for i, name in enumerate(self.names) if name == wanted and self.sources[i] == i]
        return [i + 1 for i in own if i + 1 < len(self.names) and i + 1 <= self.last_cut and not self.joined[i + 1]]


@dataclass(frozen=True)
class Parts:
    """The patch points of one live model, all found.

    `attention` is None in layers without; `true_positions`: the layers compute with position ids themselves, beside the
    rotary embedding; `blocks`: the model says what an image's tokens see, in masks of its own.
    """

    adapter: Adapter
    model: nn.Module
    base: nn.Module
    modalities: tuple["ModalityPart", ...]
    projector: nn.Module | None
    language_model: Any
    layers: tuple[nn.Module, ...]
    attention: tuple[Any, ...]
    rotary: nn.Module | None
    width: int
    first_cut: int
    true_positions: bool
    blocks: bool
    kinds: Kinds


class ModalityPart(NamedTuple):
    """A modality of a live model: its name, its encoding method, and where its placeholder's id stands.

    Users change the id after `apply` (new tokens, resized embeddings): it is read from the config in each call.
    """

    name: str
    encode: str
    config: Any
    field: str | int

    @property
    def placeholder(self) -> int:
        """The id now."""
        return self.field if isinstance(self.field, int) else getattr(self.config, self.field)


_adapters: dict[str, Adapter] = {}
_built_in: set[str] = set()
_broken: dict[str, Exception] = {}  # model types that an installed package claims, and what is wrong with it
_loaded = False


def register(adapter: Adapter) -> None:
    """Add a model type; refuses one that is taken.

    Packages can do without the call: an entry point in the group "lp_patch.adapters", called like the model type, that
    names an Adapter is found.
    """
    if not isinstance(adapter, Adapter):
        raise ConfigError(f"register takes an lp_patch.Adapter, got {type(adapter).__name__}: {adapter!r}")
    _load_adapters()
    if adapter.model_type in _adapters:
        raise ConfigError(
            f"model type {adapter.model_type!r} already has an adapter ({_adapters[adapter.model_type].family})"
        )
    _adapters[adapter.model_type] = adapter
    _broken.pop(adapter.model_type, None)


def supported() -> dict[str, str]:
    """Model types that can be patched, with the family each belongs to."""
    _load_adapters()
    return {name: _adapters[name].family for name in sorted(_adapters)}


def _load_adapters() -> None:
    """Read the built-in adapters and those of installed packages, once, at first use.

    A package that is broken costs the model types that it claims, and no other.
    """
    global _loaded
    if _loaded:
        return
    for name in sorted(x.name for x in iter_modules(import_module("lp_patch.adapters").__path__)):
        module = import_module(f"lp_patch.adapters.{name}")
        found = module.ADAPTERS if hasattr(module, "ADAPTERS") else (module.ADAPTER,)
        _adapters.update({adapter.model_type: adapter for adapter in found})
        _built_in.update(adapter.model_type for adapter in found)
    _loaded = True
    for point in entry_points(group=ENTRY_POINT_GROUP):
        claimed = point.name
        try:
            adapter = point.load()
            if not isinstance(adapter, Adapter):
                raise ConfigError(f"an entry point must name an lp_patch.Adapter, got {adapter!r}")
            claimed = adapter.model_type
            if claimed in _adapters:
                raise ConfigError(f"two adapters for the model type {claimed!r}")
            _adapters[claimed] = adapter
        except Exception as error:  # whatever another's import raises
            _broken[claimed] = error
            warnings.warn(
                f"the entry point {point.name!r} ({point.value}) of the group {ENTRY_POINT_GROUP!r} is broken, so "
                f"models of type {claimed!r} cannot be patched: {type(error).__name__}: {error}",
                stacklevel=3,
            )


def unwrap(model: object) -> Any:
    """The transformers model inside PEFT, `torch.compile` and DDP wrappers, in any order, and inside an Omni model."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        if "_orig_mod" in inner._modules:
            inner = inner._orig_mod
        elif type(inner).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = inner.module
        elif hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
            inner = cast(Any, inner).get_base_model()
        else:
            return _part(inner)
    raise UnsupportedModelError(
        f"lp_patch.apply needs a vision-language model (an nn.Module), got {type(model).__name__}: {model!r:.200}"
        + _next_step(model)
    )


def _part(model: nn.Module) -> Any:
    """The one part of a model that has an adapter, where the whole has none: the thinker of a Qwen Omni."""
    _load_adapters()

    def model_type(module: Any) -> str | None:
        return getattr(getattr(module, "config", None), "model_type", None)

    own = model_type(model)  # without one it is no model, but a wrapper that nobody knows
    whole = own is None or own in _adapters or own in UNFIT
    parts = [] if whole else [x for x in model.children() if model_type(x) in _adapters]
    return parts[0] if len(parts) == 1 else model


def _next_step(given: object) -> str:
    """What to do for somebody who gave no module, as the end of a message."""
    if isinstance(given, (str, Path)):
        return f". Load it first: AutoModelForImageTextToText.from_pretrained({str(given)!r})"
    if isinstance(given, type):
        return ". That is a class: give an instance"
    if isinstance(getattr(given, "model", None), nn.Module):
        return f". Give the model that this {type(given).__name__} holds: its .model"
    if hasattr(given, "model_input_names"):
        return ". That prepares inputs: give the model that reads them"
    return ""


def adapter_for(model: Any) -> Adapter | None:
    """The adapter of an unwrapped model; None for a type that nobody declared.

    Raises:
        UnsupportedModelError: its adapter is broken, it is known not to fit, or it is no vision-language model.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    _load_adapters()
    if model_type in _broken:
        raise UnsupportedModelError(
            f"the adapter that an installed package has for the model type {model_type!r} is broken: "
            f"{_broken[model_type]}. Repair that package, or uninstall it"
        ) from _broken[model_type]
    given = f"{type(model).__name__} (model type {model_type!r})"
    if model_type in _built_in - TRIED_BEFORE and installed() < NEWER:
        raise UnsupportedModelError(
            f"{given} was tried with transformers {'.'.join(map(str, NEWER))} and later, installed is "
            f"{version('transformers')}: upgrade it"
        )
    if model_type in _adapters:
        return _adapters[model_type]
    if model_type in UNFIT:
        raise UnsupportedModelError(
            f"{given} cannot be pruned: {UNFIT[model_type]}. lp_patch.supported() lists the model types that can"
        )
    if not hasattr(getattr(model, "config", None), "vision_config"):
        raise UnsupportedModelError(
            f"no adapter for {given}, which has no vision_config: if it is a part of a vision-language model, give the "
            "whole model. lp_patch.supported() lists the model types that can be patched; CONTRIBUTING.md shows how to "
            "add one in a short file"
        )
    return None


def find_parts(model: object, adapter: Adapter | None = None) -> Parts:
    """Find every declared patch point of a model, or say which one is missing.

    Args:
        adapter: for a model of a type that nobody declared.
    """
    inner = unwrap(model)
    adapter = adapter or adapter_for(inner)
    assert adapter is not None  # `patch.apply` asks first
    base = merging_module(inner) if adapter.merge is None else inner

    def point(root: Any, path: str) -> Any:
        found = root
        for name in path.split("."):
            found = getattr(found, name, None)
            if found is None:
                raise UnsupportedModelError(
                    f"{type(inner).__name__} has no {path!r} below {type(root).__name__}: its internals differ from "
                    f"what the {adapter.family} adapter declares (transformers {version('transformers')})"
                )
        return found

    for modality in adapter.modalities:
        point(base, modality.encode)
    if adapter.merge is not None:
        point(base, adapter.merge)
    layers = tuple(point(base, adapter.layers))
    language_model = point(base, adapter.language_model)
    if len(layers) < 2:
        raise UnsupportedModelError(
            f"pruning inside the language model needs 2 decoder layers or more, found {len(layers)}"
        )
    text_config = language_model.config
    kinds = find_kinds(layers, adapter.attention, text_config)
    attention = tuple(
        None if kind == RECURRENT else point(layer, adapter.attention)
        for layer, kind in zip(layers, kinds.names, strict=True)
    )
    for modality in adapter.modalities:
        if isinstance(modality.placeholder, str):
            point(inner.config, modality.placeholder)
    return Parts(
        adapter=adapter,
        model=inner,
        base=base,
        modalities=tuple(ModalityPart(m.name, m.encode, inner.config, m.placeholder) for m in adapter.modalities),
        projector=None if adapter.projector is None else point(base, adapter.projector),
        language_model=language_model,
        layers=layers,
        attention=attention,
        rotary=None if adapter.rotary is None else point(base, adapter.rotary),
        width=text_config.hidden_size if adapter.width is None else adapter.width(inner.config),
        first_cut=1 if adapter.first_cut is None else adapter.first_cut(inner.config),
        true_positions=any(computes_with(x, "position_ids") for x in (*layers, *attention) if x is not None),
        blocks=makes_masks(inner),
        kinds=kinds,
    )


def features_width(config: Any) -> int:
    """The width of the features that stage 1 reads, from the config of a model whose type is declared."""
    _load_adapters()
    adapter = _adapters[config.model_type]
    return config.get_text_config().hidden_size if adapter.width is None else adapter.width(config)


def find_kinds(layers: tuple[nn.Module, ...], path: str, config: Any) -> Kinds:
    """What each decoder layer looks at, by the attention at `path` below it and by the language model's config."""
    names: list[str] = []
    windows: list[int | None] = []
    sources: list[int] = []
    joined: list[bool] = []
    told = [kind_of(config, index, layer) for index, layer in enumerate(layers)]
    for index, layer in enumerate(layers):
        attention: Any = layer
        for name in path.split("."):
            attention = getattr(attention, name, None)
        # a layer without attention is one that the config calls something else; any other lacks a patch point
        called = told[index] or "attention"
        recurrent = called in KEYLESS or (attention is None and "attention" not in called)
        if "hybrid" in called:
            raise UnsupportedModelError(
                f"decoder layer {index + 1} has a state beside its keys ({called}): such layers are not supported"
            )
        reach = None if attention is None or recurrent else window(layer, attention)
        full = reach is None and told[index] in (None, "full_attention")
        names.append(RECURRENT if recurrent else FULL if full or attention is None else MASKED)
        windows.append(reach)
        same = [i for i in range(index) if told[i] == told[index] and sources[i] == i]
        joined.append(takes_over(attention))
        sources.append(same[-1] if shares_keys(attention) and same else index)
    if set(names) == {RECURRENT}:
        names = [FULL] * len(names)  # the path is wrong: the caller will say so
    return Kinds(tuple(names), tuple(windows), tuple(sources), tuple(joined))
