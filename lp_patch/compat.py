"""The one file that looks at library versions, or rather at what moved between them.

Tried with transformers 4.57, 5.17, 5.23 and 5.24.
"""

import ast
import inspect
import re
import sys
import textwrap
from dataclasses import fields, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling

_PARAMETERS = inspect.signature(create_causal_mask).parameters
_LAYER_INDEX = "layer_idx" in _PARAMETERS

# the cache's name among a forward's arguments and in its output: the newer one from 5.24 on
CACHE = "cache" if "cache" in _PARAMETERS else "past_key_values"

# methods of generate(): that may cut a prompt into chunks (one of them); that starts assisted decoding; that makes a
# forward's inputs
PREFILL_METHODS = ("_prefill", "_prefill_chunking")
CANDIDATE_METHOD = "_get_candidate_generator"
PREPARE_METHOD = "prepare_inputs_for_generation"

# keywords with bounds of packed sequences, which FlashAttention takes in place of a mask
PACKED_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def installed() -> tuple[int, ...]:
    """The version of transformers, major and minor."""
    return tuple(int(x) for x in transformers.__version__.split(".")[:2])


class _Stored:
    """Stands in for a cache that holds `past` tokens, for mask builders."""

    is_sliding = (False,)
    is_compileable = False

    def __init__(self, past: int) -> None:
        self._past = past

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._past

    get_query_offset = get_seq_length

    def get_mask_sizes(self, new: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self._past + (new.shape[0] if isinstance(new, Tensor) else new), 0


def causal_mask(config: Any, hidden: Tensor, valid: Tensor | None, past: int) -> Any:
    """The mask that transformers would hand to a decoder layer over `past` stored keys and the layer's own tokens.

    Args:
        hidden: (B, Q, C), the layer's input; only its shape, dtype and device are read.
        valid: (B, past + Q) bool, which keys are real, or None if all are.
        past: stored keys.
    """
    cache: Any = _Stored(past) if past else None
    if valid is not None:
        valid = valid.to(hidden.device)
    if _LAYER_INDEX:
        return create_causal_mask(config, hidden, valid, cache, layer_idx=0)
    position = torch.arange(past, past + hidden.shape[1], device=hidden.device)
    return create_causal_mask(config, hidden, valid, position, cache)


def slot_mask(config: Any, hidden: Tensor, valid: Tensor, cache: Cache) -> Any:
    """The mask (B, 1, Q, slots) of a decoder layer over all slots of a static cache.

    Args:
        hidden: (B, Q, C), the layer's input; only its shape, dtype and device are read.
        valid: (B, slots) bool, which slots hold, or will hold, a real token.
    """
    return create_causal_mask(config, hidden, valid.to(hidden.device), cache, layer_idx=0)


def merging_module(model: Any) -> Any:
    """The module that merges image and text; before 5.x some models with a head call themselves their base."""
    base = getattr(model, "base_model", model)
    return getattr(model, "model", model) if base is model else base


def encoded_features(output: Any) -> Any:
    """Features per visual input, from what an encoding method returns: before 5.x the features themselves."""
    if isinstance(output, (list, Tensor)) or (type(output) is tuple and len(output) and output[0].dim() == 2):
        return output
    return getattr(output, "pooler_output", None)


def show_survivors(output: Any, features: list[Tensor], survivors: list[Tensor]) -> Any:
    """A model's output in which the image features that it shows are the survivors.

    Args:
        output: of the merging module, a ModelOutput or a tuple.
        features: (N, D) each, as they were encoded, some rows without meaning.
        survivors: (R, D) each.
    """
    known = {id(feature) for feature in features}
    rows = sum(len(feature) for feature in features)

    def shown(value: Any) -> Any:
        # from 5.24 on what the encoder returned, before that its features alone, in one tensor or one by one
        pooled = getattr(value, "pooler_output", None) if isinstance(value, BaseModelOutputWithPooling) else None
        if pooled is not None and not isinstance(pooled, Tensor) and known >= {id(x) for x in pooled}:
            return replace(value, pooler_output=survivors)  # a copy: the caller may hold the encoder's output
        if isinstance(value, (tuple, list)) and len(value) and known >= {id(x) for x in value}:
            return type(value)(survivors)
        # whatever has as many rows of that width as all features are these
        if isinstance(value, Tensor) and value.shape[-1] == features[0].shape[-1]:
            if value.dim() == 3 and value.shape[:2] == (len(features), rows // len(features)):
                return torch.cat(survivors)
            if value.dim() == 2 and len(value) == rows:
                return torch.cat(survivors)
        # return_dict=False makes tuples of nested outputs too
        return tuple(map(shown, value)) if type(value) is tuple else value

    if isinstance(output, tuple):
        return tuple(map(shown, output))
    for name in ("image_outputs", "image_hidden_states"):
        if output.get(name) is not None:
            output[name] = shown(output[name])
    return output


def cache_in(kwargs: dict) -> Any:
    """The cache among a forward's keyword arguments, or None; code of others still calls it by its older name."""
    cache = kwargs.get(CACHE)
    return kwargs.get("past_key_values") if cache is None else cache


def cache_out(output: Any) -> Any:
    """The cache of a model's output, or None."""
    return getattr(output, CACHE, None)


def uncounted(kwargs: dict) -> dict:
    """Without what counts tokens before they were cut: `cache_position`, which the model makes anew, and on how many of
    the last tokens layers without keys of their own run.
    """
    counts = {"cache_position": None, "logits_to_keep": 0}
    return kwargs | {name: x for name, x in counts.items() if kwargs.get(name) is not None}


def computes_with(module: Any, name: str) -> bool:
    """Whether a module's forward does more with an argument than hand it on under its own name.

    Where its source cannot be read, an argument that it names is taken to be computed with.
    """
    forward = inspect.unwrap(type(module).forward)
    if name not in inspect.signature(forward).parameters:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return True
    handed_on = {
        id(keyword.value)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == name and isinstance(keyword.value, ast.Name)
    }
    return any(isinstance(x, ast.Name) and x.id == name and id(x) not in handed_on for x in ast.walk(tree))


def names_back_ends(module: Any) -> bool:
    """Whether a module's forward compares the name of its attention back-end with others.

    Before transformers 5 all do so, to choose the back-end: those must not take the tap for "eager".
    """
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):
        return True
    if re.search(r"_attn_implementation != .eager", source):
        return False
    return re.search(r"_attn_implementation\s*(==|!=|in\b|not in\b)", source) is not None


def window(layer: Any, attention: Any) -> int | None:
    """How many keys back this decoder layer's attention looks, or None for all of them.

    Some attentions say so themselves; others read the config, which may carry a number that nobody reads.
    """
    kind = kind_of(attention.config, getattr(attention, "layer_idx", 0), layer)
    if kind == "chunked_attention":
        return attention.config.attention_chunk_size
    if kind not in (None, "sliding_attention"):
        return None
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    if kind is not None:
        return attention.config.sliding_window
    try:
        reads = "sliding_window" in inspect.getsource(sys.modules[type(attention).__module__])
    except (OSError, TypeError):
        reads = True
    return getattr(attention.config, "sliding_window", None) if reads else None


# what transformers calls layers that have no keys
KEYLESS = ("linear_attention", "mamba", "conv", "moe", "mlp")


def kind_of(config: Any, index: int, layer: Any) -> str | None:
    """What transformers calls decoder layer `index`: "full_attention", "conv", ...; None: nothing."""
    own = getattr(layer, "attention_type", None) or getattr(layer, "layer_type", None)
    told = getattr(config, "layer_types", None)
    return own if isinstance(own, str) else told[index] if told and len(told) > index else None


def shares_keys(attention: Any) -> bool:
    """Whether an attention has no keys of its own, but takes those of an earlier layer of its kind."""
    return bool(getattr(attention, "is_kv_shared_layer", False))


def takes_over(attention: Any) -> bool:
    """Whether an attention looks at the keys that an earlier layer's indexer has picked."""
    return bool(getattr(attention, "skip_topk", False))


def full_masks(config: Any, hidden: Tensor, flat: Tensor | None, past: int) -> Any:
    """The masks that transformers would hand to this model's layers over `past` keys and all new tokens.

    Args:
        hidden: (B, S, C), of which only shape, dtype and device are read.
        flat: (B, past + S), which tokens are real, or None if all are.

    Returns:
        (B, 1, S, past + S) or None, for all layers, or in a dict by the kind of a layer.
    """
    cache: Any = _Stored(past) if past else None
    if _LAYER_INDEX:
        return create_masks_for_generate(config, hidden, flat, cache)
    position = torch.arange(past, past + hidden.shape[1], device=hidden.device)
    return create_masks_for_generate(config, hidden, flat, position, cache)


def makes_masks(model: Any) -> bool:
    """Whether a model says itself what its tokens see when generate() makes masks: blocks of an image's tokens."""
    own = getattr(type(model), "create_masks_for_generate", None)
    return own is not getattr(GenerationMixin, "create_masks_for_generate", None)


def is_recurrent(layer: Any) -> bool:
    """Whether a cache layer holds a state and no keys, or nothing at all."""
    return not hasattr(layer, "get_seq_length")


def is_exporting() -> bool:
    """Whether torch.export or torch.jit.trace is recording this call."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


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
