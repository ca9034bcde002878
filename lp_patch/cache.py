"""KV-cache layers that hold fewer tokens than they have seen.

transformers reads "tokens seen so far" and the size of its masks from the cache. A pruned dynamic layer answers the
first with the logical number, and the second with the physical one, shifted by what was dropped, as sliding-window
layers do. A pruned static layer keeps its logical length: survivors lie in the slots of their original positions, and
`stored` says which slots were written, so that whatever is compiled around it is stock.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
import wrapt
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from .compat import is_recurrent
from .errors import UnsupportedInputError

_ids = count(1)

UNLED = (
    "this cache was filled by a patched model, and holds fewer tokens than it has seen: only a model that lp_patch has "
    "patched can go on with it. Apply the patch again, or build the cache anew"
)


class Lead:
    """Shared by the layers of one cache.

    Attributes:
        on: whether a patched forward is under way, which knows what they hold.
        padded: whether any layer has padding among its stored keys.
    """

    on = False
    padded = False


@dataclass(frozen=True)
class Stored:
    """What a pruned dynamic layer holds; layers of one stage share it until somebody changes one.

    Attributes:
        dropped: tokens seen and not stored, the same for all rows (rows are padded to one length).
        valid: (B, P) bool, which of the first P physical entries are real, or None if all are.
        covered: P; entries after it map one to one to the last columns of an attention mask.
        total: entries that the layer had been given then: more than P, where it forgets.
        tail: how many of the last of those P do so too, in every row: what can still be cropped.
        where: (B, P) int64, the positions of the first P entries among the tokens seen, of padding -1; None where no
            layer of the model needs them. Masks are then made for all tokens seen.
        shift: (B, 1) int64, what compact positions lag behind original ones, or None.
        history: ids of the prunings this layer went through; layers with equal histories hold equal tokens.
    """

    dropped: int = 0
    valid: Tensor | None = None
    where: Tensor | None = None
    covered: int = 0
    total: int = 0
    tail: int = 0
    shift: Tensor | None = None
    history: tuple[int, ...] = ()

    def rows(self, change: Callable[[Tensor], Tensor]) -> "Stored":
        """With other rows."""
        valid, where, shift = (None if x is None else change(x) for x in (self.valid, self.where, self.shift))
        return replace(self, valid=valid, where=where, shift=shift)


class PrunedLayer(wrapt.BaseObjectProxy):
    """A cache layer of any kind, of which some tokens were never stored.

    Inside, the wrapped layer goes on counting physical entries; only what callers see is logical.

    Attributes:
        _self_stored: what it holds.
        _self_lead: of the cache; `_self_last`: whether this is its last layer.
    """

    def __init__(self, layer: Any, stored: Stored, lead: Lead, last: bool) -> None:
        super().__init__(layer)
        self._self_stored, self._self_lead, self._self_last = stored, lead, last

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store (B, KV, N, D) keys and values; one token alone is right without a patch too, if no row is padded."""
        lead = self._self_lead
        if not lead.on:
            stored = self._self_stored
            if key_states.shape[-2] > 1 or stored.valid is not None or stored.shift is not None:
                raise UnsupportedInputError(UNLED)
        elif self._self_last:
            lead.on = False
        return self.__wrapped__.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        """Tokens seen, stored or not."""
        return self.__wrapped__.get_seq_length() + self._self_stored.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Physical key length after `query_length` more tokens, and the offset of its first column.

        Where layers need their own masks, those of all tokens seen: each layer takes its part.
        """
        if self._self_stored.where is not None:
            return self.get_seq_length() + query_length, 0
        kv_length, offset = self.__wrapped__.get_mask_sizes(query_length)
        return kv_length, offset + self._self_stored.dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; refuses to cut into pruned visual tokens.

        A positive number is the length to keep, counted in tokens seen, as transformers 4 has it.
        """
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        stored, there = self._self_stored, self.__wrapped__.get_seq_length()
        after = there + tokens_to_remove
        lost = max(0, stored.total - after)
        if lost > stored.tail:
            raise _cannot_crop(tokens_to_remove, stored.total - stored.tail - there)
        self.__wrapped__.crop(tokens_to_remove)
        if lost:
            covered = stored.covered - lost
            valid, where = (None if x is None else x[:, :covered] for x in (stored.valid, stored.where))
            self._self_stored = replace(
                stored, covered=covered, total=after, tail=stored.tail - lost, valid=valid, where=where
            )

    def reset(self) -> None:
        """Forget all tokens."""
        self.__wrapped__.reset()
        self._self_stored = Stored()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order (beam search)."""
        self.__wrapped__.reorder_cache(beam_idx)
        self._self_stored = self._self_stored.rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.__wrapped__.batch_repeat_interleave(repeats)
        self._self_stored = self._self_stored.rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self.__wrapped__.batch_select_indices(indices)
        self._self_stored = self._self_stored.rows(lambda x: x[indices.to(x.device)])

    def _state(self) -> tuple:
        return self._self_stored, self._self_lead, self._self_last

    def __deepcopy__(self, memo: dict) -> "PrunedLayer":
        return PrunedLayer(*deepcopy((self.__wrapped__, *self._state()), memo))

    def __copy__(self) -> "PrunedLayer":
        return PrunedLayer(self.__wrapped__, *self._state())

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return PrunedLayer, (self.__wrapped__, *self._state())


class PrunedStaticLayer(StaticLayer):
    """A static layer in which some slots were never written. Its class is set on a `StaticLayer` in place.

    Attributes:
        pruned: False after `reset`: a static layer like any other.
        stored: (B, slots) bool, False where a slot was left out; one buffer for all layers of a stage.
        pending: what the next `update` is to do as a pruned prefill, or None.
        covered: tokens seen when it was pruned; `tail`: how many of the last of those every row kept.
        shift: (B, 1) int64 on the cache's first layer, what compact positions lag behind original ones, or None.
        owner: whether this layer keeps `stored` in order for the others that share it.
        lead: of the cache; `last`: whether this is its last layer.
    """

    pruned: bool
    stored: Tensor
    pending: "Slots | None"
    covered: int
    tail: int
    shift: Tensor | None
    owner: bool
    lead: Lead
    last: bool

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store (B, KV, N, D) keys and values, and return those to attend to."""
        if self.pruned:
            if not self.lead.on:
                raise UnsupportedInputError(UNLED)
            if self.last:
                self.lead.on = False
        if self.pending is None:
            return super().update(key_states, value_states, *args, **kwargs)
        slots, self.pending = self.pending, None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        fresh = (key_states, value_states)
        buffers: Any = (self.keys, self.values)
        for buffer, new in zip(buffers, fresh, strict=True):
            index = slots.index[:, None, :, None].to(new.device).expand(-1, new.shape[1], -1, new.shape[3])
            if slots.pick is not None:
                new = new.gather(2, slots.pick[:, None, :, None].to(new.device).expand_as(index))
            buffer.scatter_(2, index, new)
        self.cumulative_length.add_(slots.seen)
        if slots.past == 0:
            return fresh
        keys, values = (torch.cat([x[:, :, : slots.past], new], dim=2) for x, new in zip(buffers, fresh, strict=True))
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; refuses to cut into pruned visual tokens."""
        after = int(self.get_seq_length()) + min(0, tokens_to_remove)
        if self.pruned and after < self.covered - self.tail:
            raise _cannot_crop(tokens_to_remove, self.covered - self.tail - int(self.get_seq_length()))
        super().crop(tokens_to_remove)
        if self.pruned and after < self.covered:
            self.covered, self.tail = after, self.tail - (self.covered - after)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.stored.fill_(True)
        self.pruned, self.pending, self.shift = False, None, None

    def reorder_cache(self, beam_idx: Any) -> None:
        """Rows in another order (beam search)."""
        super().reorder_cache(beam_idx)
        if self.owner:
            self.stored.copy_(self.stored.index_select(0, beam_idx.to(self.stored.device)))


def _cannot_crop(given: int, least: int) -> UnsupportedInputError:
    return UnsupportedInputError(
        f"crop({given}) would cut into pruned visual tokens, of which only some were stored: give a value from {least} "
        "to 0, or build the cache anew"
    )


class Slots:
    """How a pruned prefill writes into the static layers of one stage.

    Attributes:
        index: (B, N) int64, the slot of each token; where rows are padded, of the token that `pick` names.
        pick: (B, N) int64 into the N tokens, a real one in the place of each padding, or None if no row is padded.
        past: tokens that were seen before.
        seen: tokens of this prefill as the caller counts them.
        stored: (B, slots) bool, already marked.
    """

    def __init__(self, index: Tensor, pick: Tensor | None, past: int, seen: int, stored: Tensor) -> None:
        self.index, self.pick, self.past, self.seen, self.stored = index, pick, past, seen, stored


def new_history_id() -> int:
    """An id for one pruning of one forward."""
    return next(_ids)


def pruned_layer(cache: Cache | None, index: int) -> PrunedLayer | None:
    """The cache's dynamic layer `index` if it was pruned, else None."""
    if cache is None or index >= len(cache.layers):
        return None
    layer: Any = cache.layers[index]
    return layer if isinstance(layer, PrunedLayer) else None


def first_layer(cache: Cache) -> Any:
    """The first layer that has keys, or None."""
    for layer in cache.layers:
        if not is_recurrent(layer):
            return layer
    return None


def _is_last(cache: Cache, index: int) -> bool:
    """Whether no layer with keys follows."""
    return all(is_recurrent(layer) for layer in cache.layers[index + 1 :])


def is_pruned(cache: Any) -> bool:
    """Whether a cache holds fewer tokens than it has seen; what is no transformers Cache never does."""
    first = first_layer(cache) if isinstance(cache, Cache) else None
    return isinstance(first, PrunedLayer) or (isinstance(first, PrunedStaticLayer) and first.pruned)


def lead(cache: Cache) -> None:
    """Let a pruned cache's layers be used: the forward that comes knows what they hold."""
    first = first_layer(cache)
    (first.lead if isinstance(first, PrunedStaticLayer) else first._self_lead).on = True


def shift_of(cache: Any) -> Tensor | None:
    """(B, 1) int64, what compact positions lag behind original ones in this cache, or None."""
    if not is_pruned(cache):
        return None
    first = first_layer(cache)
    return first.shift if isinstance(first, PrunedStaticLayer) else first._self_stored.shift


def is_padded(cache: Cache) -> bool:
    """Whether a pruned dynamic cache has padding among its stored keys."""
    return first_layer(cache)._self_lead.padded


def keeps_positions(cache: Cache) -> bool:
    """Whether the layers of a pruned dynamic cache know where their tokens stood."""
    first = first_layer(cache)
    return isinstance(first, PrunedLayer) and first._self_stored.where is not None


def check_prunable(cache: object) -> None:
    """Refuse caches whose layers cannot hold different numbers of tokens."""
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise UnsupportedInputError(
            f"lp_patch prunes what lies in a transformers Cache, got {type(cache).__name__}: pictures in continuous "
            "batching (generate_batch, transformers serve) need the patch removed"
        )
    known: list[type] = [StaticLayer, PrunedStaticLayer]
    if _slots(cache) and seen_tokens(cache) == 0:
        known.append(StaticSlidingWindowLayer)
    for layer in cache.layers:
        if is_recurrent(layer):
            continue
        static = getattr(layer, "is_compileable", False)
        # before 5.x a static layer was told its slots, counted before tokens were cut
        unknown = static and not (type(layer) in known and hasattr(layer, "cumulative_length"))
        if unknown or not hasattr(layer, "get_mask_sizes"):
            raise UnsupportedInputError(
                f"lp_patch prunes dynamic, static, quantised and offloaded caches; {type(cache).__name__} holds "
                f"{type(layer).__name__}, which is static with a window (and holds tokens, or all are so), or static "
                "in a transformers before 5: pass a DynamicCache, or remove the patch"
            )


def unroll(cache: Cache) -> None:
    """Give those layers of an empty static cache that keep a window a slot for each token.

    Survivors lie in the slots of their original positions, and masks say what is in the window.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:
            cache.layers[index] = StaticLayer(max_cache_len=_slots(cache))


def _slots(cache: Cache) -> int:
    """How many tokens a static cache is for, as far as its layers tell; 0 where all of them hold a window less long."""
    return max(
        (
            layer.max_cache_len
            for layer in cache.layers
            if isinstance(layer, StaticLayer)
            and (type(layer) is not StaticSlidingWindowLayer or getattr(layer, "_is_croppable", False))
        ),
        default=0,
    )


def is_static(cache: Any) -> bool:
    """Whether the cache has a fixed number of slots, for which generate() makes masks over all of them itself."""
    return isinstance(cache, Cache) and cache.is_compileable


def seen_tokens(cache: Cache | None) -> int:
    """Tokens that the cache has seen, stored or not."""
    return 0 if cache is None else int(cache.get_seq_length())


def history(cache: Cache | None, index: int) -> tuple[int, ...]:
    """The prunings that layer `index` went through; layers with equal histories hold equal tokens."""
    layer: Any = None if cache is None or index >= len(cache.layers) else cache.layers[index]
    if isinstance(layer, PrunedStaticLayer):
        return (id(layer.stored),) if layer.pruned else ()
    return layer._self_stored.history if isinstance(layer, PrunedLayer) else ()


def stored_tokens(cache: Cache | None, index: int) -> int:
    """Keys that layer `index` brings from before; of a static layer all that it has seen, its `stored` says which."""
    if cache is None or index >= len(cache.layers):
        return 0
    layer: Any = cache.layers[index]
    if getattr(layer, "is_sliding", False):  # the last of those that it has been given
        return min(layer.keys.shape[-2], layer.sliding_window - 1) if layer.is_initialized else 0
    return _given(layer)


def _given(layer: Any) -> int:
    """Entries that a layer has been given, all together."""
    return int(layer.get_seq_length()) - (layer._self_stored.dropped if isinstance(layer, PrunedLayer) else 0)


def positions(cache: Cache | None, index: int, seen: int, batch: int, device: torch.device) -> Tensor:
    """(B, P) int64: where the keys that layer `index` brings from before stood, of `seen` tokens; of padding -1."""
    past, pruned = stored_tokens(cache, index), pruned_layer(cache, index)
    stored = Stored() if pruned is None else pruned._self_stored
    following = past if pruned is None else _given(pruned) - stored.total
    found = torch.arange(seen - following, seen, device=device).expand(batch, -1)
    if stored.where is not None:
        found = torch.cat([stored.where.to(device), found], dim=1)
    return found[:, found.shape[1] - past :]


def mark_pruned(cache: Cache, index: int, stored: Stored) -> None:
    """Record that dynamic layer `index` was just given fewer tokens than it was shown.

    Args:
        stored: of this forward alone: `dropped` tokens more, and one more id in `history`.
    """
    layers: list[Any] = cache.layers
    if index >= len(layers) or is_recurrent(layers[index]) or layers[index].get_seq_length() == 0:
        return  # gradient checkpointing hands the layers no cache
    layer, first = layers[index], first_layer(cache)
    stored = replace(stored, total=_given(layer))
    if isinstance(layer, PrunedLayer):
        before = layer._self_stored
        layer._self_stored = replace(
            stored, dropped=before.dropped + stored.dropped, history=before.history + stored.history
        )
    else:
        lead = Lead() if layer is first else first._self_lead
        layer = layers[index] = PrunedLayer(layer, stored, lead, _is_last(cache, index))
    layer._self_lead.padded |= stored.valid is not None


def prepare_slots(
    cache: Cache, index: int, where: Tensor, pick: Tensor | None, past: int, seen: int, tail: int, known: Slots | None
) -> Slots:
    """Tell static layer `index` where its next tokens go.

    Args:
        where: (B, N) int64, their positions in the input.
        pick: as in `Slots`.
        past: tokens seen before this forward.
        seen: tokens of this forward as the caller counts them.
        tail: last tokens of the input that every row kept.
        known: what an earlier layer of the stage was told, or None for the first.
    """
    layer: Any = cache.layers[index]
    if not isinstance(layer, PrunedStaticLayer):
        layer.__class__ = PrunedStaticLayer
        layer.pruned = layer.owner = False
        layer.shift = None
    layer.owner, owned = known is None, layer.owner
    if known is None:
        if owned and len(layer.stored) == len(where):
            stored = layer.stored
        elif layer.pruned:
            stored = layer.stored.clone()
        else:
            stored = torch.ones(len(where), layer.max_cache_len, dtype=torch.bool, device=where.device)
        # a fixed address, as the layer's own buffers have it: CUDA graphs read it in every step
        torch._dynamo.mark_static_address(stored)
        places = (where if pick is None else where.gather(1, pick)) + past
        stored[:, past : past + seen] = False
        stored.scatter_(1, places, True)
        known = Slots(places, pick, past, seen, stored)
    first = first_layer(cache)
    layer.stored, layer.pending, layer.pruned = known.stored, known, True
    layer.covered, layer.tail = past + seen, tail
    layer.lead = Lead() if layer is first else first.lead
    layer.lead.on = True
    layer.last = _is_last(cache, index)
    return known


def valid_keys(
    cache: Cache | None,
    index: int,
    attention_mask: Tensor | None,
    new: int,
    cut: tuple[Tensor | None, int] | None,
) -> Tensor | None:
    """Which of the keys that layer `index` attends to in this forward are real.

    Args:
        attention_mask: (B, tokens seen + new), or None; its columns are tokens as the caller counts them.
        new: tokens of this forward as the caller counts them.
        cut: where the layer sees fewer of them: which of its N slots are real, (B, N) or None for all, and N.

    Returns:
        (B, P + N) bool over the P stored entries and the layer's N new tokens, or None if all are real.
    """
    past = stored_tokens(cache, index)
    end = 0 if attention_mask is None else attention_mask.shape[1] - new
    fresh, n_fresh = (
        cut if cut is not None else (None if attention_mask is None else attention_mask[:, end:].bool(), new)
    )
    layer: Any = None if cache is None or index >= len(cache.layers) else cache.layers[index]
    parts: list[tuple[Any, int]]
    forgotten = 0
    if isinstance(layer, PrunedStaticLayer) and past:
        head = layer.stored[:, :past]
        parts = [(head if attention_mask is None else head & attention_mask[:, :past].bool().to(head.device), past)]
    else:
        layer = pruned_layer(cache, index)
        stored = Stored() if layer is None else layer._self_stored
        following = past if layer is None else _given(layer) - stored.total
        tail = None if attention_mask is None else attention_mask[:, end - following : end].bool()
        parts = [(stored.valid, stored.covered), (tail, following)]
        forgotten = stored.covered + following - past
    parts = [(part, size) for part, size in [*parts, (fresh, n_fresh)] if size]
    known = next((part for part, _ in parts if part is not None), None)
    if known is None:
        return None
    filled = [known.new_ones((known.shape[0], size)) if part is None else part.to(known.device) for part, size in parts]
    whole = filled[0] if len(filled) == 1 else torch.cat(filled, dim=1)
    return whole[:, forgotten:]
