"""Selection and gathering: pure tensor functions, batch first, no model knowledge."""

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32: the largest similarity block ever held


def farthest_points(features: Tensor, seeds: Tensor, count: int) -> Tensor:
    """Add `count` tokens to a seed set, each the one least similar to the set so far.

    Similarity is the cosine; a token's similarity to the set is its largest one (LearnPruner section 2; with no
    seeds this is DivPrune's greedy max-min selection, which starts from the token whose nearest other is farthest).
    Ties go to the lowest index. Time O((S + count) N C), extra memory O(N) and a bounded block.

    Args:
        features: (B, N, C), any float dtype; similarities are computed in float32.
        seeds: (B, S) int64, distinct indices into N; S may be 0.
        count: tokens to add, ``0 <= count <= N - S``.

    Returns:
        (B, S + count) int64: the seeds, then the added tokens in the order they were chosen.
    """
    if count == 0:
        return seeds
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    batch, n_tokens, _ = unit.shape
    # without seeds the start needs all similarities anyway: where they fit, steps look them up
    fits = seeds.shape[1] == 0 and batch * n_tokens**2 <= _CHUNK_ELEMENTS
    table = torch.bmm(unit, unit.transpose(1, 2)) if fits else None
    if table is not None:
        # two tokens that are each other's nearest tie: rounding, which differs by shape, must not decide
        table = torch.maximum(table, table.transpose(1, 2))
    rows = max(1, _CHUNK_ELEMENTS // (batch * n_tokens))

    def similarity_to(picks: Tensor) -> Tensor:
        """(B, N, S) similarity of every token to the picked ones (B, S)."""
        return (
            torch.bmm(unit, take(unit, picks).transpose(1, 2)) if table is None else take(table, picks).transpose(1, 2)
        )

    chosen = list(seeds.unbind(1))
    if chosen:
        parts = [similarity_to(part).amax(dim=2) for part in seeds.split(rows, dim=1)]
        nearest = torch.stack(parts).amax(dim=0)
    else:
        pick = _isolated(unit, table, rows)
        chosen.append(pick.squeeze(1))
        nearest = similarity_to(pick).squeeze(2)
        seeds, count = pick, count - 1
    nearest = nearest.scatter(1, seeds, torch.inf)
    for step in range(count):
        pick = nearest.argmin(dim=1, keepdim=True)
        chosen.append(pick.squeeze(1))
        if step + 1 < count:
            nearest = torch.maximum(nearest, similarity_to(pick).squeeze(2)).scatter_(1, pick, torch.inf)
    return torch.stack(chosen, dim=1)


def covering_points(features: Tensor, scores: Tensor, count: int) -> Tensor:
    """Choose `count` tokens one by one, each the best by its score times how little it resembles those chosen (ours).

    ``argmax_i scores_i * (1 - max(0, largest cosine of i to the chosen))``: a second look at the same thing is worth
    less than a first look at another. Cosines are taken about the row's mean feature, which all tokens share. Ties go
    to the lowest index. Time O(count N C), extra memory O(N).

    Args:
        features: (B, N, C), any float dtype; similarities are computed in float32.
        scores: (B, N) float, >= 0.
        count: ``1 <= count <= N``.

    Returns:
        (B, count) int64, distinct, in the order they were chosen.
    """
    features = features.float()
    unit = torch.nn.functional.normalize(features - features.mean(dim=1, keepdim=True), dim=-1)
    nearest = torch.zeros_like(scores, dtype=torch.float32)
    taken = torch.zeros_like(scores, dtype=torch.bool)
    chosen: list[Tensor] = []
    for _ in range(count):
        worth = scores.float() * (1 - nearest).clamp(min=0)
        chosen.append(worth.masked_fill(taken, -1.0).argmax(dim=1, keepdim=True))
        taken.scatter_(1, chosen[-1], True)
        similarity = torch.bmm(unit, take(unit, chosen[-1]).transpose(1, 2)).squeeze(2)
        nearest = torch.maximum(nearest, similarity)
    return torch.cat(chosen, dim=1)


def _isolated(unit: Tensor, table: Tensor | None, rows: int) -> Tensor:
    """The token whose most similar other is least similar, `rows` at a time: (B, N, C) -> (B, 1)."""
    largest = []
    for start in range(0, unit.shape[1], rows):
        part = slice(start, start + rows)
        block = torch.bmm(unit[:, part], unit.transpose(1, 2)) if table is None else table[:, part].clone()
        block.diagonal(offset=start, dim1=1, dim2=2).fill_(-torch.inf)
        largest.append(block.amax(dim=2))
    return torch.cat(largest, dim=1).argmin(dim=1, keepdim=True)


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores of each row, best first, ties to the lowest index.

    Args:
        scores: (B, N), any float dtype.
        count: ``0 <= count <= N``.

    Returns:
        (B, count) int64.
    """
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def top_mask(scores: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
    """Mark in each row the best-scored candidates, a different number per row; ties to the lowest index.

    Args:
        scores: (B, N) float.
        candidates: (B, N) bool; only these can be marked.
        counts: (B,) int64; a count above the row's candidates marks them all.

    Returns:
        (B, N) bool.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    # candidates are counted, not masked: a score of -inf is a score like any other
    best_first = candidates.gather(1, order)
    best_first &= best_first.cumsum(dim=1) <= counts.to(order.device)[:, None]
    return torch.zeros_like(candidates).scatter_(1, order, best_first)


def select_tokens(features: Tensor, scores: Tensor | None, keep: int, diversity: float) -> Tensor:
    """Stage 1: the best-scored tokens plus a share of diverse ones, in raster order.

    ``round(diversity * keep)`` tokens are chosen by `farthest_points`, seeded with the top-scored rest. Without
    scores the whole set is chosen so.

    Args:
        features: (B, N, C); the features that similarity is measured on.
        scores: (B, N) float, higher is better, or None.
        keep: tokens to keep, ``1 <= keep <= N``.
        diversity: share in [0, 1].

    Returns:
        (B, keep) int64, ascending.
    """
    diverse = keep if scores is None else round(diversity * keep)
    seeds = (
        features.new_empty((features.shape[0], 0), dtype=torch.long)
        if scores is None or diverse == keep
        else top_indices(scores, keep - diverse)
    )
    return farthest_points(features, seeds, diverse).sort(dim=1).values


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather along dimension 1: x (B, N, ...), index (B, M) int64 -> (B, M, ...)."""
    batch, n_tokens = x.shape[:2]
    index = index.to(x.device)
    # whole rows of one flat table: many times faster than `gather`, which is asked for every element
    rows = index + n_tokens * torch.arange(batch, device=x.device)[:, None]
    flat = x.reshape(batch * n_tokens, *x.shape[2:])
    return flat.index_select(0, rows.reshape(-1)).reshape(*index.shape, *x.shape[2:])


def take_along(x: Tensor, index: Tensor, dim: int = -1) -> Tensor:
    """Gather tokens from the right: x (..., B, N) or, with dim=-2, (..., B, N, D), by index (B, M)."""
    index = index.to(x.device)
    if dim == -1:
        return x.gather(-1, index.expand(*x.shape[:-2], *index.shape))
    x = x.expand(*x.shape[:-3], index.shape[0], *x.shape[-2:])
    return x.gather(-2, index[..., None].expand(*x.shape[:-3], *index.shape, x.shape[-1]))


def compact_index(keep: Tensor, length: int) -> Tensor:
    """Where each slot of the shortened rows comes from. Rows with fewer kept tokens are padded on the left.

    Args:
        keep: (B, S) bool.
        length: slots in the shortened rows, at least the largest number kept in a row.

    Returns:
        (B, length) int64; a padding slot points at some token that is not kept, so ``keep.gather(1, index)`` tells
        the slots that hold a real one.
    """
    return keep.to(torch.uint8).sort(dim=1, stable=True).indices[:, keep.shape[1] - length :]


def restore_index(keep: Tensor, length: int) -> Tensor:
    """The slot that answers for each old position: its own, or that of the nearest kept token before it.

    Positions before the first kept token take that one.

    Args:
        keep: (B, S) bool.
        length: as given to `compact_index`.

    Returns:
        (B, S) int64 in ``[0, length)``.
    """
    slot = (keep.cumsum(dim=1) - 1).clamp(min=0) + (length - keep.sum(dim=1, keepdim=True))
    return slot.clamp(max=length - 1)
