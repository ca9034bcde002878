"""What each decoder layer of a forward attends to: which of its keys are real, and its mask."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cache as kv
from .compat import causal_mask
from .cut import Cut, take_mask
from .errors import UnsupportedInputError
from .registry import RECURRENT, Kinds


@dataclass(frozen=True)
class Keys:
    """What one decoder layer attends to. Layers of one cut and one cache history share it.

    Attributes:
        valid: (B, P + N) bool over the layer's stored and new keys, or None if all are real.
        length: P + N.
        mask: what to hand to the layer, in the form its attention back-end wants.
        where: (B, P + N) int64, the positions of those keys among all tokens seen, of padding -1, where somebody asks.
    """

    valid: Tensor | None
    length: int
    mask: Any
    where: Tensor | None = None


class KeyFinder:
    """Finds the keys of one forward's layers; layers of one cut and one cache history share theirs.

    Attributes:
        masked: whether layers are handed masks over all tokens seen, of which each takes its part.
        tracked: whether the cache is to know where its tokens stood, for such masks later.
        seen: tokens before this forward, where tracked.
    """

    def __init__(self, kinds: Kinds, cache: Any, new: int, flat: Tensor | None) -> None:
        self.kinds, self.cache, self.new, self.flat = kinds, cache, new, flat
        self.masked = self.tracked = False
        self.seen = 0
        self._fresh = not kv.is_static(cache) and not kv.is_pruned(cache)  # no layer differs from another yet
        self._shared: dict[tuple, Keys] = {}
        self._held: list[Tensor] = []

    def track(self, masked: bool, seen: int) -> None:
        """Let the cache know where its tokens stand; `masked` and `seen` as above."""
        self.masked, self.tracked, self.seen = masked, True, seen

    def find(self, config: Any, index: int, hidden: Tensor, given: Any, cut: Cut | None) -> Keys:
        """What layer `index`, which runs on this cut, attends to.

        Args:
            config: of the language model.
            hidden: (B, N, C) or longer, on the layer's device and in its dtype.
            given: the mask that the layer was handed.
            cut: the latest; None where nothing is cut.
        """
        hidden = hidden if cut is None else hidden[:, : cut.length]
        if self.kinds.names[index] == RECURRENT:
            return self._state(hidden, cut)
        if self.masked and given is not None:
            return self._by_mask(index, hidden, given, cut)
        return self.plain(config, index, hidden, cut)

    def history(self, index: int, cut: Cut | None) -> tuple:
        """Layers with equal ones hold equal tokens."""
        own = () if self._fresh else kv.history(self.cache, index)
        return cut and cut.start, own, kv.stored_tokens(self.cache, index) if self.tracked else None

    def plain(self, config: Any, index: int, hidden: Tensor, cut: Cut | None) -> Keys:
        """Keys of a layer that sees all tokens before its own."""
        key = self.history(index, cut)
        if key not in self._shared:
            valid, past = self._valid(index, cut), kv.stored_tokens(self.cache, index)
            where = self._columns(index, hidden, cut) if self.tracked else None
            self._shared[key] = Keys(valid, past + hidden.shape[1], causal_mask(config, hidden, valid, past), where)
        return self._shared[key]

    def _by_mask(self, index: int, hidden: Tensor, given: Any, cut: Cut | None) -> Keys:
        """Keys of a layer whose mask was made for all tokens seen."""
        key = (*self.history(index, cut), id(given))
        if key not in self._shared:
            if not isinstance(given, Tensor) or given.dim() != 4:
                raise UnsupportedInputError(
                    f"decoder layer {index + 1} looks at what its mask says, which is to be (batch, heads, queries, "
                    f"keys) where tokens were pruned, got {type(given).__name__}: use "
                    'model.set_attn_implementation("sdpa")'
                )
            columns = self._columns(index, hidden, cut).to(given.device)
            # its last column is the last token, its first one need not be the first; of a static cache, slots follow
            first = 0 if kv.is_static(self.cache) else self.seen + self.new - given.shape[3]
            rows = None if cut is None else cut.where.to(given.device)
            self._shared[key] = Keys(
                self._valid(index, cut), columns.shape[1], take_mask(given, rows, columns - first), columns
            )
            self._held.append(given)  # so that no other takes its id
        return self._shared[key]

    def _valid(self, index: int, cut: Cut | None) -> Tensor | None:
        fresh = None if cut is None else (cut.valid, cut.length)
        return kv.valid_keys(self.cache, index, self.flat, self.new, fresh)

    def _columns(self, index: int, hidden: Tensor, cut: Cut | None) -> Tensor:
        """(B, P + N) int64: the positions of the keys of a layer with this input (B, N, C), of padding -1."""
        past = kv.positions(self.cache, index, self.seen, len(hidden), hidden.device)
        if cut is None:
            own = torch.arange(self.new, device=hidden.device).expand(len(hidden), -1)
        else:
            own = cut.where.to(hidden.device)
        return torch.cat([past, torch.where(own < 0, own, own + self.seen)], dim=1)

    def _state(self, hidden: Tensor, cut: Cut | None) -> Keys:
        """For a layer whose state runs along: which of its new tokens are real, (B, N) int64; None if all are."""
        length = hidden.shape[1]
        valid = cut.valid if cut is not None else None if self.flat is None else self.flat[:, -length:]
        mask = None if valid is None or length == 1 else valid.to(hidden.device, torch.long)
        return Keys(None, length, mask)
