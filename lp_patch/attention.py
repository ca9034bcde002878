"""Reading one attention layer's own queries and keys, whatever attention back-end the model uses.

transformers looks the attention function up by name in each call, in a config that all layers share. A tapped layer
sees that config through a proxy in which only the name differs; the function behind it looks, then calls the back-end
that the shared config names at that moment.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import UnsupportedModelError

TAP_NAME = "lp_patch_tap"
REPLACED_NAME = "lp_patch_replaced"

Observer = Callable[[Tensor, Tensor, Tensor, float], Any]


class TappedConfig:
    """A live view of a config, in which `_attn_implementation` names the tap.

    Plain Python on purpose: dynamo reads through C-level proxies without noticing what they override.
    """

    _attn_implementation = TAP_NAME

    def __init__(self, config: Any, observer: Observer) -> None:
        self._tapped = config
        self._observer = observer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tapped, name)

    def __deepcopy__(self, memo: dict) -> "TappedConfig":
        return type(self)(deepcopy(self._tapped, memo), deepcopy(self._observer, memo))

    def __reduce__(self) -> tuple:
        return type(self), (self._tapped, self._observer)


@torch.compiler.disable
def _tapped_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The registered attention function: show query (B, H, Q, D), key and value (B, KV, K, D), call the real one."""
    config = module.config
    scaling = kwargs.get("scaling")
    config._observer(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    name = config._tapped._attn_implementation
    attention = _eager_attention(module) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    return attention(module, query, key, value, *args, **kwargs)


def _eager_attention(module: nn.Module) -> Callable:
    return sys.modules[type(module).__module__].eager_attention_forward


class ReplacedConfig(TappedConfig):
    """The same view, in which `_attn_implementation` names a function that may take the layer's place."""

    _attn_implementation = REPLACED_NAME


def _replaced_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **kwargs: Any
) -> Any:
    """The registered attention function: ours, or where that returns None the real one."""
    config = module.config
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = config._observer(query, key, value, scaling)
    if out is not None:
        return out.transpose(1, 2).contiguous(), None
    name = config._tapped._attn_implementation
    attention = _eager_attention(module) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    return attention(module, query, key, value, mask, scaling=scaling, **kwargs)


def check_tappable(attention: nn.Module, path: str) -> None:
    """Refuse an attention module whose back-end transformers does not look up by name."""
    if not hasattr(attention, "config") or not hasattr(
        sys.modules[type(attention).__module__], "eager_attention_forward"
    ):
        raise UnsupportedModelError(
            f"{path} ({type(attention).__name__}) does not use transformers' AttentionInterface, "
            "so its queries and keys cannot be read"
        )


def check_rotary(attention: nn.Module, path: str) -> None:
    """Refuse a rotary embedding that does not pair the first half of a head with the second, as Llama's does."""
    rotate_half = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    if rotate_half is None or rotate_half(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        raise UnsupportedModelError(
            f"{path} ({type(attention).__name__}) rotates queries and keys in its own way, which cannot be undone: "
            "use another text_scorer"
        )


def install_tap(attention: Any, observer: Observer) -> Callable[[], None]:
    """Show `observer` every (query, key, value, scaling) of this module; returns what undoes it."""
    AttentionInterface.register(TAP_NAME, _tapped_attention)
    attention.config = TappedConfig(attention.config, observer)
    return partial(_remove_tap, attention)


def install_attention(attention: Any, function: Callable) -> Callable[[], None]:
    """Compute this module's attention by `function` (query, key, value, scaling) -> (B, H, Q, D), or None for its own.

    Returns what undoes it.
    """
    AttentionInterface.register(REPLACED_NAME, _replaced_attention)
    attention.config = ReplacedConfig(attention.config, function)
    return partial(_remove_tap, attention)


def _remove_tap(attention: Any) -> None:
    attention.config = attention.config._tapped
