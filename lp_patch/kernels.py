"""The selection's two kernels in Triton; imported only where they are to run. `select` has their reference in PyTorch.

They hold to its rule: what a row keeps depends on its own tokens alone. Every cosine is summed in the same order
wherever its two tokens stand, in float32, from products that are exact for half-precision features and nearly so for
float32 ones (three tf32 products for one, whatever PyTorch's switches for tf32 say).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # tokens along each side of the square that a program computes


@triton.jit
def _cosines(
    features: tl.tensor, scales: tl.tensor, table: tl.tensor, n_tokens: int, width: int,
    TILE: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """A program for each square of TILE x TILE pairs of tokens on or above the diagonal of a row's table."""
    tiles = tl.cdiv(n_tokens, TILE)
    row = tl.program_id(0) // (tiles * tiles)
    left = tl.program_id(0) // tiles % tiles * TILE + tl.arange(0, TILE)
    right = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    if tl.program_id(0) // tiles % tiles > tl.program_id(0) % tiles:
        return  # the square across the diagonal writes both
    first = row.to(tl.int64) * n_tokens
    a_rows = (first + left)[:, None] * width
    b_rows = (first + right)[:, None] * width
    ab = tl.zeros((TILE, TILE), dtype=tl.float32)
    ba = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, width, DEPTH):
        columns = (start + tl.arange(0, DEPTH))[None, :]
        a = tl.load(features + a_rows + columns, mask=(left < n_tokens)[:, None] & (columns < width), other=0.0)
        b = tl.load(features + b_rows + columns, mask=(right < n_tokens)[:, None] & (columns < width), other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        # both orders: which of two tokens is the left factor must not show, as it would in three products for one
        ab = tl.dot(a, tl.trans(b), ab, input_precision=PRECISION)
        ba = tl.dot(b, tl.trans(a), ba, input_precision=PRECISION)
    a_scale = tl.load(scales + first + left, mask=left < n_tokens, other=0.0)
    b_scale = tl.load(scales + first + right, mask=right < n_tokens, other=0.0)
    cosine = tl.maximum(ab, tl.trans(ba)) * (a_scale[:, None] * b_scale[None, :])
    cosine = tl.where(tl.abs(cosine) < 2.0, cosine, 0.0)  # of a token that is not finite: it resembles nothing
    inside = (left < n_tokens)[:, None] & (right < n_tokens)[None, :]
    tl.store(table + (first + left)[:, None] * n_tokens + right[None, :], cosine, mask=inside)
    tl.store(table + (first + right)[:, None] * n_tokens + left[None, :], tl.trans(cosine), mask=tl.trans(inside))


@triton.jit(do_not_specialize=["count"])
def _greedy(
    table: tl.tensor, nearest: tl.tensor, scores: tl.tensor, chosen: tl.tensor, n_tokens: int, count: int,
    SCORED: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A program for each row: `select._greedy`, with the row's state in registers."""
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, BLOCK)
    real = tokens < n_tokens
    near = tl.load(nearest + row * n_tokens + tokens, mask=real, other=float("inf"))
    score = near
    if SCORED:
        score = tl.load(scores + row * n_tokens + tokens, mask=real, other=0.0)
    for step in range(count):
        worth = -near
        if SCORED:
            worth = score * tl.maximum(1.0 - near, 0.0)
        worth = tl.where(near == float("inf"), float("-inf"), worth)
        pick = tl.argmax(worth, axis=0, tie_break_left=True)
        tl.store(chosen + row * count + step, pick.to(tl.int64))
        similarity = tl.load(table + (row * n_tokens + pick) * n_tokens + tokens, mask=real, other=0.0)
        near = tl.where(tokens == pick, float("inf"), tl.maximum(near, similarity))


def cosines(features: Tensor, scales: Tensor) -> Tensor:
    """Cosines of all pairs of tokens of each row, symmetric to the last bit.

    Args:
        features: (B, N, C), any float dtype; float64 is rounded to float32.
        scales: (B, N), one over each token's length, 0 for one that resembles nothing.

    Returns:
        (B, N, N) float32. Where float32 overflows, for tokens longer than 1e18, a cosine is 0.
    """
    batch, n_tokens, width = features.shape
    if features.dtype == torch.float64:
        features = features.float()
    on_nvidia = features.is_cuda and torch.version.hip is None
    capability = torch.cuda.get_device_capability(features.device) if on_nvidia else None
    table = torch.empty((batch, n_tokens, n_tokens), dtype=torch.float32, device=features.device)
    with torch.cuda.device_of(features):
        _cosines[(batch * triton.cdiv(n_tokens, TILE) ** 2,)](
            features.contiguous(), scales.float().contiguous(), table, n_tokens, width,
            **cosines_settings(features.dtype, capability),
        )  # fmt: skip
    return table


def cosines_settings(dtype: torch.dtype, capability: tuple[int, int] | None) -> dict[str, Any]:
    """How `_cosines` is compiled for features of `dtype`: `capability` of an NVIDIA device, None for another one."""
    # tensor cores know bfloat16 and tf32 since Ampere; AMD's compiler has no tf32x3, the interpreter no bfloat16
    modern = capability is not None and capability >= (8, 0)
    widen = dtype == torch.bfloat16 and not modern
    return {
        "TILE": TILE,
        "DEPTH": 32 if widen or dtype == torch.float32 else 64,
        "WIDEN": widen,
        "PRECISION": "tf32x3" if modern else "ieee",
        "num_warps": 4,
        "num_stages": 3,
        "enable_fp_fusion": True,
    }


def greedy(table: Tensor, nearest: Tensor, scores: Tensor | None, count: int) -> Tensor:
    """The greedy choice in one launch; arguments as for `select._greedy`, with `table` (B, N, N) float32 of cosines."""
    batch, n_tokens = nearest.shape
    chosen = torch.empty((batch, count), dtype=torch.long, device=table.device)
    with torch.cuda.device_of(table):
        _greedy[(batch,)](
            table.contiguous(), nearest.contiguous(), nearest if scores is None else scores.contiguous(), chosen,
            n_tokens, count, **greedy_settings(n_tokens, scores is not None),
        )  # fmt: skip
    return chosen


def greedy_settings(n_tokens: int, scored: bool) -> dict[str, Any]:
    """How `_greedy` is compiled: eight numbers of each vector for a thread, until there are 512 threads."""
    block = triton.next_power_of_2(n_tokens)
    warps = min(16, max(1, block // 256))
    return {"SCORED": scored, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}
