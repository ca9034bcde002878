"""KV-cache layers that hold fewer tokens than they have seen.

transformers reads "tokens seen so far" and the size of its masks from the cache. A pruned layer answers the first with
the logical number, and the second with the physical one, shifted by what was dropped, as sliding-window layers do.
"""

from copy import deepcopy
from itertools import count
from typing import Any

import torch
import wrapt
from torch import Tensor
from transformers.cache_utils import Cache

from .errors import UnsupportedInputError

_ids = count(1)


class PrunedLayer(wrapt.BaseObjectProxy):
    """A cache layer of any kind, of which some tokens were never stored.

    Inside, the wrapped layer goes on counting physical entries; only what callers see is logical.

    Attributes:
        _self_dropped: tokens seen and not stored, the same for all rows (rows are padded to one length).
        _self_valid: (B, P) bool, which of the first P physical entries are real, or None if all are.
        _self_covered: P; entries after it map one to one to the last columns of an attention mask.
        _self_tail: how many of the last of those P do so too, in every row: what can still be cropped.
        _self_shift: (B, 1) int64, what compact positions lag behind original ones, or None.
        _self_history: ids of the prunings this layer went through; layers with equal histories hold equal tokens.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self._self_dropped = 0
        self._self_valid: Tensor | None = None
        self._self_covered = 0
        self._self_tail = 0
        self._self_shift: Tensor | None = None
        self._self_history: tuple[int, ...] = ()

    def get_seq_length(self) -> int:
        """Tokens seen, stored or not."""
        return self.__wrapped__.get_seq_length() + self._self_dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Physical key length after `query_length` more tokens, and the offset of its first column."""
        kv_length, offset = self.__wrapped__.get_mask_sizes(query_length)
        return kv_length, offset + self._self_dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; refuses to cut into pruned visual tokens.

        A positive number is the length to keep, counted in tokens seen, as transformers 4 has it.
        """
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        after = self.__wrapped__.get_seq_length() + tokens_to_remove
        lost = max(0, self._self_covered - after)
        if lost > self._self_tail:
            least = -(self.__wrapped__.get_seq_length() - self._self_covered + self._self_tail)
            raise UnsupportedInputError(
                f"crop({tokens_to_remove}) would cut into pruned visual tokens, of which only some were stored: "
                f"give a value from {least} to 0, or build the cache anew"
            )
        self.__wrapped__.crop(tokens_to_remove)
        if lost:
            self._self_covered, self._self_tail = after, self._self_tail - lost
            if self._self_valid is not None:
                self._self_valid = self._self_valid[:, :after]

    def reset(self) -> None:
        """Forget all tokens."""
        self.__wrapped__.reset()
        self._self_dropped, self._self_covered, self._self_tail, self._self_history = 0, 0, 0, ()
        self._self_valid = self._self_shift = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order (beam search)."""
        self.__wrapped__.reorder_cache(beam_idx)
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.__wrapped__.batch_repeat_interleave(repeats)
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self.__wrapped__.batch_select_indices(indices)
        self._rows(lambda x: x[indices.to(x.device)])

    def _rows(self, change: Any) -> None:
        if self._self_valid is not None:
            self._self_valid = change(self._self_valid)
        if self._self_shift is not None:
            self._self_shift = change(self._self_shift)

    def __deepcopy__(self, memo: dict) -> "PrunedLayer":
        return _rebuild(deepcopy(self.__wrapped__, memo), deepcopy(self._state(), memo))

    def __copy__(self) -> "PrunedLayer":
        return _rebuild(self.__wrapped__, self._state())

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (self.__wrapped__, self._state())

    def _state(self) -> tuple:
        return (
            self._self_dropped,
            self._self_valid,
            self._self_covered,
            self._self_tail,
            self._self_shift,
            self._self_history,
        )


def _rebuild(layer: Any, state: tuple) -> PrunedLayer:
    pruned = PrunedLayer(layer)
    (
        pruned._self_dropped,
        pruned._self_valid,
        pruned._self_covered,
        pruned._self_tail,
        pruned._self_shift,
        pruned._self_history,
    ) = state
    return pruned


def new_history_id() -> int:
    """An id for one pruning of one forward."""
    return next(_ids)


def pruned_layer(cache: Cache | None, index: int) -> PrunedLayer | None:
    """The cache's layer `index` if it was pruned, else None."""
    if cache is None or index >= len(cache.layers):
        return None
    layer: Any = cache.layers[index]
    return layer if isinstance(layer, PrunedLayer) else None


def check_prunable(cache: object) -> None:
    """Refuse caches whose layers cannot hold different numbers of tokens."""
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise UnsupportedInputError(f"the cache must be a transformers Cache, got {type(cache).__name__}")
    for layer in cache.layers:
        # before 5.x a static layer was told its slots, counted before tokens were cut
        placed_by_caller = getattr(layer, "is_compileable", False) and not hasattr(layer, "cumulative_length")
        if getattr(layer, "is_sliding", False) or placed_by_caller or not hasattr(layer, "get_mask_sizes"):
            raise UnsupportedInputError(
                f"lp_patch prunes dynamic, static, quantised and offloaded caches; {type(cache).__name__} holds "
                f"{type(layer).__name__}, which is windowed, no attention layer, or static in a transformers before "
                "5: pass a DynamicCache, or remove the patch"
            )


def is_static(cache: Cache | None) -> bool:
    """Whether the cache has a fixed number of slots, for which generate() makes 4-D masks itself."""
    return cache is not None and cache.is_compileable


def seen_tokens(cache: Cache | None) -> int:
    """Tokens that the cache has seen, stored or not."""
    return 0 if cache is None else int(cache.get_seq_length())


def history(cache: Cache | None, index: int) -> tuple[int, ...]:
    """The prunings that layer `index` went through; layers with equal histories hold equal tokens."""
    layer = pruned_layer(cache, index)
    return () if layer is None else layer._self_history


def stored_tokens(cache: Cache | None, index: int) -> int:
    """Physical entries of layer `index`."""
    if cache is None or index >= len(cache.layers):
        return 0
    pruned = pruned_layer(cache, index)
    return int(cache.get_seq_length(index)) - (0 if pruned is None else pruned._self_dropped)


def mark_pruned(
    cache: Cache, index: int, dropped: int, valid: Tensor | None, tail: int, shift: Tensor | None, history: int
) -> None:
    """Record that layer `index` was just given `dropped` tokens fewer than it was shown.

    Args:
        valid: (B, P) bool over all its physical entries, or None if all are real.
        tail: last tokens of the input that every row kept.
        shift: (B, 1) int64, or None.
        history: from `new_history_id`, equal for layers that dropped the same tokens.
    """
    if stored_tokens(cache, index) == 0:
        return  # gradient checkpointing hands the layers no cache
    layer: Any = cache.layers[index]
    if not isinstance(layer, PrunedLayer):
        layer = cache.layers[index] = PrunedLayer(layer)  # type: ignore[call-overload]
    layer._self_dropped += dropped
    layer._self_valid = valid
    layer._self_covered = int(layer.__wrapped__.get_seq_length())
    layer._self_tail = tail
    layer._self_shift = shift
    layer._self_history = (*layer._self_history, history)


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
    stored = stored_tokens(cache, index)
    layer = pruned_layer(cache, index)
    covered = 0 if layer is None else layer._self_covered
    head = None if layer is None else layer._self_valid
    end = 0 if attention_mask is None else attention_mask.shape[1] - new
    tail = None if attention_mask is None else attention_mask[:, end - (stored - covered) : end].bool()
    fresh, n_fresh = (
        cut if cut is not None else (None if attention_mask is None else attention_mask[:, end:].bool(), new)
    )
    parts = [(head, covered), (tail, stored - covered), (fresh, n_fresh)]
    known = next((part for part, _ in parts if part is not None), None)
    if known is None:
        return None
    return torch.cat(
        [known.new_ones((known.shape[0], size)) if part is None else part.to(known.device) for part, size in parts],
        dim=1,
    )


def mask_columns(cache: Cache | None, index: int, valid: Tensor | None) -> Tensor | None:
    """A 2-D mask whose columns transformers' mask builders read for layer `index`: they skip the dropped ones."""
    layer = pruned_layer(cache, index)
    if valid is None or layer is None:
        return valid
    return torch.nn.functional.pad(valid, (layer._self_dropped, 0), value=True)
