"""Reading or replacing one attention layer's attention, whatever back-end the model uses.

transformers looks the attention function up by name in each call, in a config that all layers share. A tapped layer
sees that config through a view in which only the name differs; the function behind it looks, then calls the back-end
that the shared config names at that moment, with the layer as it was. For whom it looks arrives as a keyword of the
language model's forward (`KEY`), which the layers hand on.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compat import names_back_ends
from .errors import UnsupportedModelError

KEY = "lp_patch"  # the keyword by which a forward carries its state to its layers
TAP_NAME = "lp_patch_tap"


class Attended(NamedTuple):
    """What an attention layer hands to its back-end.

    Attributes:
        query: (B, H, Q, D), rotated.
        key: (B, KV, K, D), rotated; value: likewise.
        mask: in the form that the back-end wants, or None.
        scaling: factor on the dot product.
        sinks: (H,) logits of one more key that nobody has, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float
    sinks: Tensor | None


# (what came under KEY or None, what is attended to) -> None: the layer's own attention, or (B, H, Q, D) in its place
Observer = Callable[[Any, Attended], Tensor | None]


class BackEndName(str):
    """The tap's name, for a module that compares it with names of back-ends: equal to the one behind it as well."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or str(self).partition("|")[2] == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__  # it is looked up as the tap's


class TappedConfig:
    """A live view of a config, in which `_attn_implementation` names the tap; the back-end's name is its ending.

    transformers asks names whether "flash" is in them. Plain Python on purpose: dynamo reads through C-level proxies
    without noticing what they override. `compared`: whether its module compares names.
    """

    def __init__(self, config: Any, observer: Observer, compared: bool = False) -> None:
        self._tapped = config
        self._observer = observer
        self._compared = compared

    @property
    def _attn_implementation(self) -> str:
        behind = self._tapped._attn_implementation
        if not self._compared:
            return tap_name(behind)
        return BackEndName(tap_name(behind))

    def __getattr__(self, name: str) -> Any:
        if name == "_tapped":  # half unpickled
            raise AttributeError(name)
        return getattr(self._tapped, name)

    def __deepcopy__(self, memo: dict) -> "TappedConfig":
        return type(self)(deepcopy(self._tapped, memo), deepcopy(self._observer, memo), self._compared)

    def __reduce__(self) -> tuple:
        return type(self), (self._tapped, self._observer, self._compared)


class Untapped:
    """An attention module as it was before its tap, for a back-end that reads its config."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.config = module.config._tapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def tap_name(implementation: str) -> str:
    """The name under which the tap before this back-end is registered, here if it is not yet."""
    name = f"{TAP_NAME}|{implementation}"
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, _tapped_attention)
    return name


def _tapped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **kwargs: Any
) -> Any:
    """The registered attention function: query (B, H, Q, D), key and value (B, KV, K, D)."""
    config = module.config
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = config._observer(kwargs.pop(KEY, None), Attended(query, key, value, mask, factor, kwargs.get("s_aux")))
    if out is not None:
        return out.transpose(1, 2).contiguous(), None
    name = config._tapped._attn_implementation
    attention = _eager_attention(module) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name.removeprefix("paged|")]
    if scaling is not None:
        kwargs["scaling"] = scaling
    return attention(Untapped(module), query, key, value, mask, **kwargs)


def _eager_attention(module: nn.Module) -> Callable:
    return sys.modules[type(module).__module__].eager_attention_forward


def check_tappable(attention: nn.Module, path: str) -> None:
    """Refuse an attention module whose back-end transformers does not look up by name."""
    if not hasattr(attention, "config") or not hasattr(
        sys.modules[type(attention).__module__], "eager_attention_forward"
    ):
        raise UnsupportedModelError(
            f"{path} ({type(attention).__name__}) does not use transformers' AttentionInterface, "
            "so its queries and keys cannot be read"
        )


def check_rotary(attention: Any, rotary: Any, path: str) -> None:
    """Refuse a rotary embedding that does not pair the first half of a head with the second, as Llama's does."""
    frequencies, width = getattr(rotary, "inv_freq", None), getattr(attention, "head_dim", None)
    if rotary is None or (frequencies is not None and width is not None and 2 * len(frequencies) != width):
        raise UnsupportedModelError(
            f"{path} ({type(attention).__name__}) rotates no query and key, or a part of them: use another text_scorer"
        )
    rotate_half = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    if rotate_half is None or rotate_half(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        raise UnsupportedModelError(
            f"{path} ({type(attention).__name__}) rotates queries and keys in its own way, which cannot be undone: "
            "use another text_scorer"
        )


def install_tap(attention: Any, observer: Observer) -> Callable[[], None]:
    """Show `observer` every call of this module's attention; returns what undoes it."""
    attention.config = TappedConfig(attention.config, observer, names_back_ends(attention))
    return partial(_remove_tap, attention)


def _remove_tap(attention: Any) -> None:
    # somebody may have given the module another config since: that is not ours to take
    if isinstance(attention.config, TappedConfig):
        attention.config = attention.config._tapped
