"""Attention under a soft token mask, for training a pruner inside a frozen model (LearnPruner, section 3)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UnsupportedInputError

# The largest block of attention weights ever held, unless the query itself is larger. On a CPU it should fit a cache.
_BLOCK_ELEMENTS = 1 << 24
_CPU_BLOCK_ELEMENTS = 1 << 19
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gated_attention(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, *, scaling: float | None = None, difference: bool = False
) -> Tensor:
    """Causal attention in which each key counts as much as its gate says, but every query sees itself in full.

    ``A_ij = exp(s_ij) G_ij / sum_k exp(s_ik) G_ik`` over ``k <= i``, with ``G_ij = 1 if i == j else gate_j`` and
    ``s_ij = scaling * <q_i, k_j>`` (LearnPruner, section 3). With gates 0 and 1 the open tokens get what they would
    get if the closed ones were removed; a query whose other keys are all closed sees itself alone. A closed gate
    still gets its gradient: with ``Z_i`` the gated sum, ``dL/dgate_j`` is the sum over heads and ``i > j`` of
    ``exp(s_ij) / Z_i * <dL/do_i, v_j - o_i>``.

    Only a block of queries is expanded at a time, forward and backward: memory is linear in L. Computed in float64
    for float64 inputs, else in float32, under autocast too. Differentiable once.

    Args:
        query: (B, H, L, D), rotated, any float dtype.
        key: (B, KV, L, D), rotated; KV divides H (grouped-query attention).
        value: (B, KV, L, D).
        gate: (B, L) float in [0, 1]: 1 on text, the pruner's mask on visual tokens, 0 on padding. The range is not
            checked, which would stall a GPU: a negative gate gives NaN.
        scaling: factor on the dot product; None means ``D ** -0.5``.
        difference: for gates of 0 and 1 alone: in place of the derivative, the gate's gradient is the difference that
            opening the key makes to each query by itself (ours). With ``p = exp(s_ij) / Z_i`` it is the derivative over
            ``1 + p`` for a closed key and over ``1 - p`` for an open one: bounded, where the derivative at a closed
            key with a large score promises any multiple of what opening it can give.

    Returns:
        (B, H, L, D) in the query's dtype.
    """
    _check(query, key, value, gate)
    out: Tensor = _GatedAttention.apply(
        query, key, value, gate, query.shape[-1] ** -0.5 if scaling is None else scaling, difference
    )
    return out


class _GatedAttention(torch.autograd.Function):
    """Saves its inputs, its output and the log of the gated normaliser, as flash attention does."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scaling: float, difference: bool
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            q, k, v, g = _prepared(query, key, value, gate, scaling)
            log_gate = g.log()
            out = torch.empty_like(q, dtype=query.dtype)
            normaliser = q.new_empty(q.shape[:-1])
            for start, stop in _blocks(q):
                # -inf on closed keys: they take no part in the maximum either, however large their scores
                weights = _gated_scores(q, k, log_gate, start, stop, own=0.0)
                top = weights.amax(dim=-1, keepdim=True)
                total = weights.sub_(top).exp_().sum(dim=-1, keepdim=True)
                mixed = (weights.flatten(2, 3) @ v[:, :, :stop]).view_as(q[..., start:stop, :])
                out[..., start:stop, :] = mixed / total
                normaliser[..., start:stop] = (top + total.log()).squeeze(-1)
        out = out.view(query.shape)
        ctx.save_for_backward(query, key, value, gate, out, normaliser)
        ctx.scaling, ctx.difference = scaling, difference
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        query, key, value, gate, out, normaliser = ctx.saved_tensors
        # A closed key's weight is taken at a tiny gate, and divided by that for the gate's own gradient. The limit
        # keeps every sum finite; it is met only where that gradient is too large for the dtype (it becomes inf).
        number = torch.finfo(normaliser.dtype)
        limit = 0.7 * math.log(number.max)
        with torch.autocast(query.device.type, enabled=False):
            q, k, v, g = _prepared(query, key, value, gate, ctx.scaling)
            floored = g.clamp(min=number.tiny**0.5)
            share = (g / floored)[:, None, :, None]  # what is left of a key at its true gate: 1, or 0 if closed
            grad = grad.to(q.dtype).view(q.shape)
            mean = (grad * out.view(q.shape)).sum(dim=-1)
            open_k, log_gate = k * share, floored.log()
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            grad_gate = torch.zeros_like(floored)
            for start, stop in _blocks(q):
                rows = slice(start, stop)
                scores = _gated_scores(q, k, log_gate, start, stop, own=-math.inf)
                weights = scores.sub_(normaliser[..., rows, None]).clamp_(max=limit).exp_().flatten(2, 3)
                q_rows, grad_rows = q[..., rows, :].flatten(2, 3), grad[..., rows, :].flatten(2, 3)
                grad_v[:, :, :stop] += weights.mT @ grad_rows
                change = (grad_rows @ v[:, :, :stop].mT).sub_(mean[..., rows].flatten(2, 3)[..., None]).mul_(weights)
                effect = _per_step(change, weights, floored[:, :stop]) if ctx.difference else change
                grad_gate[:, :stop] += effect.sum(dim=(1, 2))
                grad_q[..., rows, :] = (change @ open_k[:, :, :stop]).view_as(q[..., rows, :])
                grad_k[:, :, :stop] += change.mT @ q_rows
            # what every query sees of itself, gate 1
            k, v = k[:, :, None], v[:, :, None]
            weights = ((q * k).sum(dim=-1) - normaliser).exp_()[..., None]
            change = weights * ((grad * v).sum(dim=-1) - mean)[..., None]
            grad_q = (grad_q + change * k) * ctx.scaling
            grad_k = grad_k * share + (change * q).sum(dim=2)
            grad_v = grad_v * share + (weights * grad).sum(dim=2)
        return (
            grad_q.view(query.shape).to(query.dtype),
            grad_k.to(key.dtype),
            grad_v.to(value.dtype),
            (grad_gate / floored).to(gate.dtype),
            None,
            None,
        )


def _per_step(change: Tensor, weights: Tensor, gate: Tensor) -> Tensor:
    """The share of `change` (B, KV, Q, K) that a whole step of each gate (B, K) makes, times the gate."""
    gate = gate[:, None, None, :]
    rest = torch.where(gate < 0.5, 1 + weights / gate, (1 - weights).clamp(min=torch.finfo(weights.dtype).eps))
    return change / rest


def _gated_scores(q: Tensor, k: Tensor, log_gate: Tensor, start: int, stop: int, own: float) -> Tensor:
    """s + log G of the queries start to stop, with `own` for the log G of a query's own key.

    q (B, KV, G, L, D), scaled; k (B, KV, L, D); log_gate (B, L) -> (B, KV, G, stop - start, stop).
    """
    rows = q[..., start:stop, :]
    scores = (rows.flatten(2, 3) @ k[:, :, :stop].mT).view(*rows.shape[:-1], stop)
    bias = log_gate[:, None, :stop].repeat(1, stop - start, 1)
    square = bias[..., start:]
    later = torch.ones(square.shape[1:], dtype=torch.bool, device=square.device).triu(1)
    square.masked_fill_(later, -torch.inf).diagonal(dim1=1, dim2=2).fill_(own)
    return scores.add_(bias[:, None, None])


def _blocks(q: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of queries whose weights make one block, for q (B, KV, G, L, D)."""
    length, dim = q.shape[3:]
    limit = _CPU_BLOCK_ELEMENTS if q.device.type == "cpu" else _BLOCK_ELEMENTS
    rows = max(1, dim, limit // max(1, math.prod(q.shape[:4])))
    for start in range(0, length, rows):
        yield start, min(start + rows, length)


def _prepared(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, scaling: float) -> tuple[Tensor, ...]:
    """The inputs in the dtype to compute in, contiguous; the query scaled and by key, (B, KV, G, L, D)."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(dtype).contiguous() for x in (query, key, value))
    return q.unflatten(1, (k.shape[1], -1)) * scaling, k, v, gate.to(dtype)


def _check(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> None:
    """Refuse shapes and dtypes that do not fit together."""
    given = {"query": query, "key": key, "value": value, "gate": gate}
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
    expected = "expected query (B, H, L, D), key and value (B, KV, L, D) with KV dividing H, and gate (B, L)"
    if [x.dim() for x in given.values()] != [4, 4, 4, 2]:
        raise UnsupportedInputError(f"gated_attention got {shapes}; {expected}.")
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    if not (
        key.shape == value.shape == (batch, kv_heads, length, dim)
        and gate.shape == (batch, length)
        and kv_heads
        and heads % kv_heads == 0
    ):
        raise UnsupportedInputError(f"gated_attention got {shapes}; {expected}.")
    dtypes = ", ".join(f"{name} {x.dtype}" for name, x in given.items())
    if any(x.dtype not in _DTYPES for x in given.values()):
        raise UnsupportedInputError(
            f"gated_attention got {dtypes}; allowed are {', '.join(map(str, _DTYPES))}. Cast with .float()."
        )
    if len({x.dtype == torch.float64 for x in (query, key, value)}) > 1:
        raise UnsupportedInputError(
            f"gated_attention got {dtypes}; query, key and value must be float64 together, or none of them."
        )
