"""Selection and gathering: pure tensor functions, batch first, no model knowledge.

`farthest_points`, `covering_points` and `select_tokens` are one registered operator each, so that a compiler, a tracer
and a CUDA graph take a whole selection as one step. What they run is written here in plain PyTorch; on CUDA, where
Triton works, the two inner parts (all cosines, the greedy loop) are the kernels of `kernels.py`.

A row keeps what it would keep alone: cosines are summed in float64 and rounded to float32, so that the order of
summation, which differs by shape, does not show. The kernels sum in float32, in an order that no shape changes. Two
devices may still choose differently where cosines agree to within 1e-6.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32, 128 of float64: the largest similarity block that plain PyTorch holds
_KERNEL_ELEMENTS = 1 << 26  # 256 MiB: what the tables of rows that the kernels take together may hold
_KERNEL_TOKENS = 1 << 14  # longest row that they take, alone and with a table of 1 GiB


def operator(function: Callable[..., Tensor]) -> torch.library.CustomOpDef:
    """Register `function` as ``lp_patch::`` its name: one operator, run outside of autocast, without a gradient.

    Its first argument is a tensor, its arguments are annotated, and it returns a new tensor. A fake is still to be
    registered.
    """

    @functools.wraps(function)
    def run(first: Tensor, *rest: object) -> Tensor:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    return torch.library.custom_op(f"lp_patch::{function.__name__.lstrip('_')}", run, mutates_args=())


def farthest_points(features: Tensor, seeds: Tensor, count: int) -> Tensor:
    """Add `count` tokens to a seed set, each the one least similar to the set so far. One operator.

    Similarity is the cosine; a token's similarity to the set is its largest one (LearnPruner section 2; with no
    seeds this is DivPrune's greedy max-min selection, which starts from the token whose nearest other is farthest).
    Ties go to the lowest index. A token of zeros, or with a number that is not finite, resembles nothing.

    Without seeds, all cosines of a row are held at once, N * N float32, where N <= 4096; else a step computes its own:
    time O((S + count) N C). On CUDA with Triton they always are, where N <= 16384; without Triton a GPU runs the same
    PyTorch operations as a CPU, several for each step.

    Args:
        features: (B, N, C), any float dtype.
        seeds: (B, S) int64, distinct indices into N; S may be 0.
        count: tokens to add, ``0 <= count <= N - S``.

    Returns:
        (B, S + count) int64: the seeds, then the added tokens in the order they were chosen.
    """
    return _farthest_points(features, seeds, count)


def covering_points(features: Tensor, scores: Tensor, count: int) -> Tensor:
    """Choose `count` tokens one by one, each the best by its score times how little it resembles those chosen (ours).

    ``argmax_i scores_i * (1 - max(0, largest cosine of i to the chosen))``: a second look at the same thing is worth
    less than a first look at another. Cosines are taken about the row's mean feature, which all tokens share. Ties go
    to the lowest index. One operator, in memory and on a GPU as `farthest_points` without seeds.

    Args:
        features: (B, N, C), any float dtype.
        scores: (B, N) float, >= 0; NaN counts as 0.
        count: ``1 <= count <= N``.

    Returns:
        (B, count) int64, distinct, in the order they were chosen.
    """
    return _covering_points(features, scores, count)


def select_tokens(features: Tensor, scores: Tensor | None, keep: int, diversity: float) -> Tensor:
    """Stage 1: the best-scored tokens plus a share of diverse ones, in raster order. One operator.

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
    return _select_tokens(features, scores, keep, keep if scores is None else round(diversity * keep))


@operator
def _farthest_points(features: Tensor, seeds: Tensor, count: int) -> Tensor:
    return torch.cat([seeds, _farthest(features, seeds, count)], dim=1)


@operator
def _covering_points(features: Tensor, scores: Tensor, count: int) -> Tensor:
    return torch.cat([_covering(*part, count) for part in _groups(features, scores.float().nan_to_num())])


@operator
def _select_tokens(features: Tensor, scores: Tensor | None, keep: int, diverse: int) -> Tensor:
    if scores is None or diverse == keep:
        seeds = torch.empty((features.shape[0], 0), dtype=torch.long, device=features.device)
    else:
        seeds = top_indices(scores, keep - diverse)
    return torch.cat([seeds, _farthest(features, seeds, diverse)], dim=1).sort(dim=1).values


@_farthest_points.register_fake
def _(features: Tensor, seeds: Tensor, count: int) -> Tensor:
    return seeds.new_empty(seeds.shape[0], seeds.shape[1] + count)


@_covering_points.register_fake
@_select_tokens.register_fake
def _(features: Tensor, scores: Tensor | None, count: int, diverse: int = 0) -> Tensor:
    return features.new_empty(features.shape[0], count, dtype=torch.long)


def _farthest(features: Tensor, seeds: Tensor, count: int) -> Tensor:
    """(B, count): what `farthest_points` adds to the seeds."""
    if count == 0:
        return seeds[:, :0]
    chosen = []
    for part, known in _groups(features, seeds):
        similarity = _Cosines(part, whole=known.shape[1] == 0)
        start = known if known.shape[1] else similarity.most_isolated()
        nearest = similarity.nearest(start).scatter_(1, start, torch.inf)
        rest = _greedy(similarity, nearest, None, count if known.shape[1] else count - 1)
        chosen.append(rest if known.shape[1] else torch.cat([start, rest], dim=1))
    return torch.cat(chosen)


def _covering(features: Tensor, scores: Tensor, count: int) -> Tensor:
    """(B, count): `covering_points` of finite scores in float32."""
    wide = features.to(_wide(features))
    similarity = _Cosines(wide - wide.mean(dim=1, keepdim=True), whole=True)
    return _greedy(similarity, torch.zeros_like(scores), scores, count)


def _greedy(similarity: "_Cosines", nearest: Tensor, scores: Tensor | None, count: int) -> Tensor:
    """The choice itself, token by token, for both: the least similar, or the best by score times dissimilarity.

    Args:
        similarity: of B rows of N tokens.
        nearest: (B, N) float32, similarity to the nearest token chosen before; infinite for that token itself.
        scores: (B, N) float32, finite, or None.
        count: how many.

    Returns:
        (B, count) int64.
    """
    if similarity.kernels is not None:
        return similarity.kernels.greedy(similarity.table, nearest, scores, count)
    chosen = torch.empty((nearest.shape[0], count), dtype=torch.long, device=nearest.device)
    for step in range(count):
        worth = -nearest if scores is None else scores * (1 - nearest).clamp(min=0)
        pick = worth.masked_fill(nearest == torch.inf, -torch.inf).argmax(dim=1, keepdim=True)
        chosen[:, step : step + 1] = pick
        if step + 1 < count:
            nearest = torch.maximum(nearest, similarity.of(pick).squeeze(1)).scatter_(1, pick, torch.inf)
    return chosen


class _Cosines:
    """Cosines of the tokens of each row of (B, N, C), in float32: a table of all, or computed when asked for."""

    def __init__(self, features: Tensor, whole: bool) -> None:
        """`whole`: all will be asked for, so that a table pays where it fits."""
        self.shape, self.device = features.shape[:2], features.device
        n_tokens = self.shape[1]
        self.kernels = _kernels(self.device) if n_tokens <= _KERNEL_TOKENS else None
        fits = self.kernels is not None or (whole and n_tokens**2 <= _CHUNK_ELEMENTS)
        self.table: Tensor | None = cosines(features) if fits else None
        self.unit: Tensor | None = None if fits else _unit(features)

    def of(self, picks: Tensor) -> Tensor:
        """(B, S, N) of tokens `picks` (B, S) to all."""
        if self.unit is None:
            return take(self.table, picks)  # type: ignore[arg-type]
        return torch.bmm(take(self.unit, picks), self.unit.transpose(1, 2)).float()

    def nearest(self, picks: Tensor) -> Tensor:
        """(B, N): the largest of each token to one of `picks` (B, S), S >= 1."""
        return torch.stack([self.of(part).amax(dim=1) for part in self._parts(picks)]).amax(dim=0)

    def most_isolated(self) -> Tensor:
        """(B, 1): the token whose largest to another one is the least."""
        everyone = torch.arange(self.shape[1], device=self.device).expand(self.shape)
        largest = [
            self.of(part).scatter_(2, part[:, :, None], -torch.inf).amax(dim=2) for part in self._parts(everyone)
        ]
        return torch.cat(largest, dim=1).argmin(dim=1, keepdim=True)

    def _parts(self, picks: Tensor) -> tuple[Tensor, ...]:
        batch, n_tokens = self.shape
        return picks.split(max(1, _CHUNK_ELEMENTS // (batch * n_tokens)), dim=1)


def cosines(features: Tensor) -> Tensor:
    """Cosines of all pairs of tokens of a row: (B, N, C), any float dtype -> (B, N, N) float32, symmetric.

    A token of zeros, or with a number that is not finite, has 0 with all, itself included.
    """
    kernels = _kernels(features.device)
    if kernels is not None:
        return kernels.cosines(features, _scale(features))
    unit = _unit(features)
    table = torch.empty((*unit.shape[:2], unit.shape[1]), dtype=torch.float32, device=unit.device)
    for row, tokens in zip(table, unit, strict=True):
        row.copy_(tokens @ tokens.T)
    # two tokens that are each other's nearest tie: rounding must not decide
    return torch.maximum(table, table.transpose(1, 2))


def _unit(features: Tensor) -> Tensor:
    """Tokens (B, N, C) of length 1, or of zeros, in `_wide`."""
    scale = _scale(features)[:, :, None]
    return (features * scale).masked_fill_(scale == 0, 0)  # what is not finite stays so, times 0


def _scale(features: Tensor) -> Tensor:
    """(B, N) in `_wide`: one over a token's length, 0 where that is not finite; lengths count from 1e-12."""
    length = torch.linalg.vector_norm(features, dim=2, dtype=_wide(features))
    return torch.where(length.isfinite(), 1 / length.clamp(min=1e-12), 0)


def _wide(features: Tensor) -> torch.dtype:
    """The dtype in which sums do not show their order. MPS has none: there, in float32, it may show."""
    return torch.float32 if features.device.type == "mps" else torch.float64


def _groups(features: Tensor, others: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both, (B, ...), some rows at a time, so that a table of each fits."""
    limit = _CHUNK_ELEMENTS if _kernels(features.device) is None else _KERNEL_ELEMENTS
    rows = max(1, limit // features.shape[1] ** 2)
    return zip(features.split(rows), others.split(rows), strict=True)


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """`kernels.py` where it works: on a CUDA device, with a Triton that can build for it."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:  # builds for Windows have none
        return None
    try:
        from . import kernels

        table = torch.eye(2, device=device)[None]
        kernels.greedy(kernels.cosines(table, table[:, 0]), table[:, 0], None, 1)
    except Exception as error:  # no compiler, an old GPU: whatever the driver and the compiler raise
        warnings.warn(
            f"Triton is installed but does not work on {device}: {type(error).__name__}: {error}. Tokens are selected "
            "by PyTorch operations, which chooses the same and takes longer",
            stacklevel=2,
        )
        return None
    return kernels


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores of each row, best first, ties to the lowest index.

    Args:
        scores: (B, N), any float dtype.
        count: ``0 <= count <= N``.

    Returns:
        (B, count) int64.
    """
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def top_mask(scores: Tensor, candidates: Tensor, counts: Tensor | int) -> Tensor:
    """Mark in each row the best-scored candidates, a different number per row; ties to the lowest index.

    Args:
        scores: (B, N) float.
        candidates: (B, N) bool; only these can be marked.
        counts: (B, 1) int64, or one for all rows; a count above the row's candidates marks them all.

    Returns:
        (B, N) bool.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    # candidates are counted, not masked: a score of -inf is a score like any other
    best_first = candidates.gather(1, order)
    best_first &= best_first.cumsum(dim=1) <= counts
    return torch.zeros_like(candidates).scatter_(1, order, best_first)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather along dimension 1: x (B, N, ...), index (B, M) int64 -> (B, M, ...)."""
    batch, n_tokens = x.shape[:2]
    index = index.to(x.device)
    if batch == 1:
        return x.index_select(1, index.reshape(-1)).reshape(*index.shape, *x.shape[2:])
    # whole rows of one flat table: many times faster than `gather`, which is asked for every element
    rows = index + n_tokens * torch.arange(batch, device=x.device)[:, None]
    flat = x.reshape(batch * n_tokens, *x.shape[2:])
    return flat.index_select(0, rows.reshape(-1)).reshape(*index.shape, *x.shape[2:])


def true_slots(mask: Tensor, count: int) -> Tensor:
    """Where a mask (N,) bool is true, ascending: (count,) int64, a number that is known, so that nobody waits."""
    return mask.byte().sort(descending=True, stable=True).indices[:count]  # CUDA's sort did not always take bools
