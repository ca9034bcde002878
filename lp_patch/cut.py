"""Shortening a sequence on the device: pure tensor functions, lengths known beforehand, no wait for the device.

Rows of a batch may keep different numbers of tokens; shorter ones are padded on the left. An index of -1 is padding.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .select import take, top_mask


@dataclass(frozen=True)
class Cut:
    """One shortening of the sequence, valid from decoder layer `start` on.

    Attributes:
        start: from 0.
        length: tokens per row, padding included.
        where: (B, N) int64, ascending, positions in the input; of padding -1.
        index: (B, N) int64 >= 0 into the tokens before this cut; padding points at some token.
        valid: (B, N) bool, or None if no row is padded.
        visual: (B, N) bool.
    """

    start: int
    length: int
    where: Tensor
    index: Tensor
    valid: Tensor | None
    visual: Tensor

    @property
    def pick(self) -> Tensor | None:
        """(B, N) int64: each slot's own number, in the place of padding that of the row's first token."""
        return None if self.valid is None else self.at_least_first(torch.arange(self.length, device=self.where.device))

    def at_least_first(self, slots: Tensor) -> Tensor:
        """Slots (B or 1, M) int64, those of padding replaced by the row's first token; a row may have none."""
        # counted on the device: numbers from the host would wait for it
        return slots.maximum((self.where < 0).sum(dim=1, keepdim=True).clamp_(max=self.length - 1))


def first_cut(base: Tensor, holes: Tensor, chosen: Tensor | None, visual: Tensor, counts: list[int]) -> Cut:
    """Stage 1: what is left of the input.

    Args:
        base: (B, N) int64, positions of the tokens that stay for certain, -1 elsewhere.
        holes: (T,) int64, places in the flat `base` for the chosen tokens.
        chosen: (T,) int64, their positions, or None if no token was chosen.
        visual: (B, S) bool.
        counts: tokens that each row keeps.
    """
    length = base.shape[1]
    if chosen is not None:
        base = base.flatten().index_copy(0, holes, chosen).view_as(base)
    where = base.sort(dim=1).values
    valid, index = None, where
    if min(counts) < length:
        valid, index = where >= 0, where.clamp(min=0)
    seen = take(visual, index)
    return Cut(0, length, where, index, valid, seen if valid is None else seen & valid)


def best_cut(start: int, last: Cut, scores: Tensor, wanted: Tensor | int, counts: list[int]) -> tuple[Cut, Tensor]:
    """Stage 2: text and the best-scored visual tokens of each row; ties to the lowest index.

    Args:
        last: what the scored tokens came from.
        scores: (B, N) float.
        wanted: visual tokens that each row keeps, (B, 1) int64, or one number for all.
        counts: all tokens that each row keeps.

    Returns:
        The cut, and (B, N) bool, the visual tokens that stay.
    """
    chosen = top_mask(scores, last.visual, wanted)
    return keep_cut(start, last, chosen | ~last.visual, counts), chosen


def keep_cut(start: int, last: Cut, keep: Tensor, counts: list[int]) -> Cut:
    """What `keep` (B, N) bool leaves of the last cut's tokens; `counts` are its row sums without padding."""
    length = max(1, *counts)
    if last.valid is not None:
        keep = keep & last.valid
    slots = torch.arange(last.length, device=keep.device).expand_as(keep)
    index = slots.masked_fill(~keep, -1).sort(dim=1).values[:, last.length - length :]
    valid, places = None, index
    if min(counts) < length:
        valid, places = index >= 0, index.clamp(min=0)
    where, visual = last.where.gather(1, places), last.visual.gather(1, places)
    if valid is not None:
        where, visual = where.masked_fill(~valid, -1), visual & valid
    return Cut(start, length, where, places, valid, visual)


def upload(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """int64 arrays on the device, in one transfer that the host does not wait for."""
    whole = torch.from_numpy(np.concatenate([x.reshape(-1) for x in arrays])).to(device, non_blocking=True)
    parts = whole.split([x.size for x in arrays])
    return [part.view(x.shape) for part, x in zip(parts, arrays, strict=True)]


def left_mask(where: Tensor, length: int) -> Tensor:
    """Positions (B, N) int64, -1 for padding -> (B, length) bool: which are left."""
    return spread(where, torch.ones_like(where, dtype=torch.bool), length)


def spread(where: Tensor, values: Tensor, length: int) -> Tensor:
    """Values (B, N) at positions `where` (B, N) int64, -1 for nowhere -> (B, length), zero elsewhere."""
    return values.new_zeros(len(where), length + 1).scatter_(1, where.remainder(length + 1), values)[:, :length]


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of a rotary embedding x (..., B or 1, S, D) by index (B, N) int64: (..., B, N, D)."""
    index = index.to(x.device)
    if x.shape[-3] == 1:
        rows = x.squeeze(-3).index_select(-2, index.flatten())
        return rows.reshape(*x.shape[:-3], *index.shape, x.shape[-1])
    index = index[..., None].expand(*x.shape[:-3], *index.shape, x.shape[-1])
    return x.gather(-2, index)


def take_tokens(hidden: Tensor, index: Tensor, streams: bool) -> Tensor:
    """Tokens of hidden states (B, N, C), or of several streams of them (A, B, N, C), by index (B, M) int64."""
    return torch.stack([take(x, index) for x in hidden]) if streams else take(hidden, index)


def take_mask(mask: Tensor, rows: Tensor | None, columns: Tensor) -> Tensor:
    """The part of an attention mask that is left.

    Args:
        mask: (B or 1, H, S, K) bool, or float with the lowest number where nothing is seen.
        rows: (B, N) int64 into S, of padding -1; None: all.
        columns: (B, M) int64 into K, of padding -1.

    Returns:
        (B, H, N, M); padding is not seen, and sees what the first row does.
    """
    mask = mask.expand(len(columns), -1, -1, -1)
    heads = mask.shape[1]
    if rows is not None:
        mask = mask.gather(2, rows.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
    index = columns.clamp(min=0)[:, None, None].expand(-1, heads, mask.shape[2], -1)
    padding = (columns < 0)[:, None, None]
    unseen = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.gather(3, index).masked_fill(padding, unseen)


def restore_index(cut: Cut, length: int) -> Tensor:
    """The slot that answers for each of the input's `length` positions: its own, or the nearest one before it.

    Positions before a row's first token take that one.

    Returns:
        (B, S) int64 in ``[0, N)``.
    """
    positions = torch.arange(length, device=cut.where.device).expand(len(cut.where), length).contiguous()
    slot = torch.searchsorted(cut.where, positions, right=True) - 1
    return slot.clamp_(min=0) if cut.valid is None else cut.at_least_first(slot)
