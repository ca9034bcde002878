"""The one file that looks at library versions, or rather at what moved between them.

Tried with transformers 4.57, 5.17 and 5.24.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

_PARAMETERS = inspect.signature(create_causal_mask).parameters
_LAYER_INDEX = "layer_idx" in _PARAMETERS

# the cache's name among a forward's arguments and in its output: the newer one from 5.24 on
CACHE = "cache" if "cache" in _PARAMETERS else "past_key_values"

# methods of generate() that may cut a prompt into chunks
PREFILL_METHODS = ("_prefill", "_prefill_chunking")


class _OneLayer:
    """A cache of which mask builders see a single layer: before 5.x they always asked for the first one."""

    is_sliding = (False,)
    is_compileable = False

    def __init__(self, cache: Cache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def get_mask_sizes(self, cache_position: Tensor, layer_idx: int) -> tuple[int, int]:
        return self._cache.get_mask_sizes(cache_position, self._layer)  # type: ignore[arg-type]


def causal_mask(config: Any, hidden: Tensor, attention_mask: Tensor | None, cache: Cache | None, layer: int) -> Any:
    """The mask that transformers would hand to decoder layer `layer`, sized for that layer's own keys.

    Args:
        hidden: (B, Q, C), the layer's input; only its shape, dtype and device are read.
        attention_mask: (B, offset + P + Q) over the layer's physical keys, or None if all are real.
    """
    if _LAYER_INDEX:
        return create_causal_mask(config, hidden, attention_mask, cache, layer_idx=layer)
    seen = 0 if cache is None else cache.get_seq_length(layer)
    position = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)
    view: Any = None if cache is None else _OneLayer(cache, layer)
    return create_causal_mask(config, hidden, attention_mask, position, view)


def merging_module(model: Any) -> Any:
    """The module that merges image and text; before 5.x some models with a head call themselves their base."""
    base = getattr(model, "base_model", model)
    return getattr(model, "model", model) if base is model else base


def encoded_features(output: Any) -> Any:
    """Features per visual input, from what an encoding method returns: before 5.x the features themselves."""
    if isinstance(output, (list, Tensor)) or (type(output) is tuple and len(output) and output[0].dim() == 2):
        return output
    return getattr(output, "pooler_output", None)


def unmark(output: Any, survivors: Callable[[Tensor], Tensor]) -> None:
    """Replace the image features that a model's output shows; from 5.24 on that is what the encoder returned."""
    encoded = getattr(output, "image_outputs", None)
    if isinstance(encoded, BaseModelOutputWithPooling) and encoded.pooler_output is not None:
        # a copy: the caller may hold the encoder's output, and give it again
        features: Any = [survivors(x) for x in encoded.pooler_output]
        output.image_outputs = replace(encoded, pooler_output=features)
    elif isinstance(states := getattr(output, "image_hidden_states", None), Tensor):
        output.image_hidden_states = survivors(states)


def cache_in(kwargs: dict) -> Any:
    """The cache among a forward's keyword arguments, or None; code of others still calls it by its older name."""
    cache = kwargs.get(CACHE)
    return kwargs.get("past_key_values") if cache is None else cache


def cache_out(output: Any) -> Any:
    """The cache of a model's output, or None."""
    return getattr(output, CACHE, None)


def uncounted(kwargs: dict) -> dict:
    """Without `cache_position`, which counts the tokens before they were cut: the model makes its own."""
    return kwargs if kwargs.get("cache_position") is None else {**kwargs, "cache_position": None}


def warmup(share: float) -> dict[str, float]:
    """TrainingArguments for a warm-up over this share of all steps; 5.x has one argument for steps and shares."""
    from transformers import TrainingArguments

    names = {field.name for field in fields(TrainingArguments)}
    return {"warmup_ratio" if "warmup_ratio" in names else "warmup_steps": share}


def checkpoint_layers(model: Any, kwargs: dict, **options: Any) -> None:
    """Turn on gradient checkpointing, which newer transformers call activation checkpointing."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(model, f"{name}_enable"):
            getattr(model, f"{name}_enable")(**{f"{name}_kwargs": kwargs}, **options)
            return
