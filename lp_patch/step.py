"""One token more on a pruned static cache: stock, but for which slots each layer may look at.

All of it is traced when generate() compiles a decode step: plain Python and tensors, no state, no wait.
"""

from typing import Any

import torch
from torch import Tensor

from .attention import KEY
from .cache import PrunedStaticLayer, first_layer, is_static
from .compat import cache_in, slot_mask


class Step:
    """The masks of one step, by the layer from which on they hold; it reaches the layers as a keyword.

    What is handed to a layer without keys stays: those masks are no part of it.
    """

    def __init__(self, starts: list[int], masks: list[Any]) -> None:
        self.starts, self.masks = starts, masks

    def mask(self, index: int, given: Any) -> Any:
        """What decoder layer `index` attends to."""
        found = given
        for start, mask in zip(self.starts, self.masks, strict=True):
            if start <= index:
                found = mask
        if isinstance(found, dict):
            # the model has taken the one of this layer's type
            return next((found[name] for name, mask in self.masks[0].items() if mask is given), given)
        return found


def tokens_of(args: tuple, kwargs: dict) -> Tensor | None:
    """The input ids (B, S), or embeddings (B, S, D), of a forward."""
    embeds = kwargs.get("inputs_embeds")
    return kwargs.get("input_ids", args[0] if args else None) if embeds is None else embeds


def is_static_step(args: tuple, kwargs: dict) -> bool:
    """Whether this forward is one token on a static cache: what generate() may compile."""
    cache, tokens = cache_in(kwargs), tokens_of(args, kwargs)
    return tokens is not None and tokens.shape[1] == 1 and is_static(cache)


def static_step(config: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The language model's arguments for tokens on a static cache, or None if that was not pruned."""
    cache = cache_in(kwargs)
    first = first_layer(cache)
    if not isinstance(first, PrunedStaticLayer) or not first.pruned:
        return None
    first.lead.on = True
    starts: list[int] = []
    masks: list[Any] = []
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PrunedStaticLayer) and layer.owner:
            starts.append(index)
            masks.append(_masked(config, args, kwargs, layer.stored))
    kwargs = {**kwargs, "attention_mask": masks[0], KEY: Step(starts, masks)}
    if first.shift is not None:
        tokens, ids = tokens_of(args, kwargs), kwargs.get("position_ids")
        assert tokens is not None
        if ids is None:
            ids = (torch.arange(tokens.shape[1], device=tokens.device) + cache.get_seq_length())[None]
        kwargs["position_ids"] = ids - first.shift.to(ids.device)
    return args, kwargs


def _masked(config: Any, args: tuple, kwargs: dict, stored: Tensor) -> Any:
    """The given mask without the slots that were never written: `stored` (B, slots) bool."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        # what is no mask over slots is for layers without keys
        over_slots = {name: x for name, x in mask.items() if x is not None and x.dim() == 4}
        return mask | {
            name: _masked(config, args, {**kwargs, "attention_mask": x}, stored) for name, x in over_slots.items()
        }
    if mask is not None and mask.dim() == 4:
        seen = stored[:, None, None, : mask.shape[-1]]
        return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
    valid = stored if mask is None else stored[:, : mask.shape[1]] & mask.bool()
    tokens = tokens_of(args, kwargs)
    assert tokens is not None
    hidden = torch.empty((*tokens.shape[:2], 0), dtype=config.dtype, device=tokens.device)
    return slot_mask(config, hidden, valid, cache_in(kwargs))
