"""Attention-based importance, computed from queries and keys: pure tensor functions, batch first, float32 inside."""

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32: the largest block of attention weights ever held


def received_attention(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    scaling: float,
    *,
    key_mask: Tensor | None = None,
    causal: bool = True,
    sinks: Tensor | None = None,
) -> Tensor:
    """Post-softmax attention that each key receives from weighted queries, averaged over heads.

    The softmax runs over every key that the query can see, as in the layer itself. Only a block of queries is
    expanded at a time, so memory stays bounded however long the text is.

    Args:
        query: (B, H, Q, D), rotated; the Q queries are the last ones of the sequence.
        key: (B, KV, K, D), rotated, ``K >= Q`` if causal; KV divides H (grouped-query attention).
        query_weight: (B, Q) float; rows normally sum to 1, 0 leaves a query out.
        scaling: factor on the dot product.
        key_mask: (B, K) bool, True where a key is real, or (B, Q, K), where a query sees it; None means all are.
        causal: query i sees keys up to ``K - Q + i``.
        sinks: (H,) logits of one more key, which receives and is not counted; None: there is none.

    Returns:
        (B, K) float32.
    """
    with torch.autocast(query.device.type, enabled=False):
        return _received(query, key, query_weight, scaling, key_mask, causal, sinks)


def received_in_tower(query: Tensor, key: Tensor, scaling: float, of: str = "cls") -> Tensor:
    """Attention that each token of a vision layer receives, from [CLS] alone or from all, averaged over heads.

    Args:
        query: (B, H, 1 + N, D), [CLS] first; key: alike.
        scaling: factor on the dot product.
        of: "cls", or "all" for the mean over every token, [CLS] included.

    Returns:
        (B, N) float32: what [CLS] itself receives is left out.
    """
    asking = query[:, :, :1] if of == "cls" else query
    batch, length = asking.shape[0], asking.shape[2]
    weight = torch.full((batch, length), 1 / length, device=query.device)
    return received_attention(asking, key, weight, scaling, causal=False)[:, 1:]


def _received(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    scaling: float,
    key_mask: Tensor | None,
    causal: bool,
    sinks: Tensor | None,
) -> Tensor:
    batch, heads, n_queries, dim = query.shape
    kv_heads, n_keys = key.shape[1], key.shape[2]
    keys = key.float().transpose(2, 3)
    columns = torch.arange(n_keys, device=key.device)
    received = torch.zeros(batch, n_keys, dtype=torch.float32, device=key.device)
    rows = max(1, _CHUNK_ELEMENTS // max(1, batch * heads * n_keys))
    for start in range(0, n_queries, rows):
        block = query[:, :, start : start + rows].float() * scaling
        length = block.shape[2]
        # heads of one group share their keys: fold the group into the rows instead of repeating the keys
        logits = (block.reshape(batch, kv_heads, -1, dim) @ keys).view(batch, heads, length, n_keys)
        if causal:
            last = torch.arange(start, start + length, device=key.device) + (n_keys - n_queries)
            logits = logits.masked_fill(columns > last[:, None], -torch.inf)
        if key_mask is not None:
            seen = key_mask[:, None] if key_mask.dim() == 2 else key_mask[:, start : start + length]
            logits = logits.masked_fill(~seen[:, None], -torch.inf)
        # a padding query sees nothing: its softmax is NaN, and its weight of 0 would not remove that
        if sinks is not None:
            more = sinks.float()[:, None, None].expand(batch, -1, length, 1)
            logits = torch.cat([logits, more], dim=-1)
        weights = logits.softmax(dim=-1)[..., :n_keys].nan_to_num(0.0)
        received += torch.einsum("bhqk,bq->bk", weights, query_weight[:, start : start + length].float())
    return received / heads
