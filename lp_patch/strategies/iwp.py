"""IWP (arXiv 2604.00757): tokens as updates of an implicit weight: the large ones, unless others kept say the same.

How the duplication of several heads is joined is ours: their mean, as in the magnitude.
"""

import torch
from torch import Tensor

from ..select import take, top_indices
from .base import Stage2Input, TextScorer, register
from .text import text_query_weights

_CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32: the largest block of duplication ever held


def score(x: Stage2Input) -> Tensor:
    """(B, N): each token's magnitude, reduced by what it repeats of the tokens chosen before it.

    Tokens are chosen in chunks of 2, 4, 8, ... Reductions only lower what is left: the highest scores are the choice.
    """
    with torch.autocast(x.query.device.type, enabled=False):
        return _score(x)


def _score(x: Stage2Input) -> Tensor:
    n_tokens = x.visual.shape[1]
    key, value = x.key[:, :, -n_tokens:].float(), x.value[:, :, -n_tokens:].float()
    query = (x.unrotated(x.query) * x.weights[:, None, :, None]).sum(dim=2)
    scores = magnitude(query, x.unrotated(key), value, x.visual, x.scaling)
    left, chunk, chosen = x.visual.clone(), 2, 0
    while chosen < x.keep:
        # a row picks others only when it has no token left, and so none to reduce
        picks = top_indices(scores.masked_fill(~left, -torch.inf), chunk)
        left = left.scatter(1, picks, False)
        reduced = scores * (1 - 5 * duplication(key, value, picks, x.scaling)).clamp(min=0.01)
        scores = torch.where(left, reduced, scores)
        chunk, chosen = 2 * chunk, chosen + chunk
    return scores


def magnitude(query: Tensor, key: Tensor, value: Tensor, visual: Tensor, scaling: float) -> Tensor:
    """Size of each token's update under the mean query, from 0 to 1 over a row's visual tokens.

    Args:
        query: (B, H, D), not rotated; KV divides H.
        key: (B, KV, N, D), not rotated.
        value: (B, KV, N, D).
        visual: (B, N) bool; other tokens get -1.
        scaling: factor on the dot product.

    Returns:
        (B, N) float32.
    """
    batch, heads, dim = query.shape
    kv_heads, n_tokens = key.shape[1:3]
    logits = (query.view(batch, kv_heads, -1, dim) @ key.transpose(2, 3)) * scaling
    logits = logits.masked_fill(~visual[:, None, None], -torch.inf)
    # a common factor in a row does not outlive the scaling to [0, 1], and exp must not overflow
    top = logits.amax(dim=(1, 2, 3), keepdim=True).nan_to_num(neginf=0.0)
    size = ((logits - top).exp() * value.norm(dim=3)[:, :, None]).reshape(batch, heads, n_tokens).mean(dim=1)
    low = size.masked_fill(~visual, torch.inf).amin(dim=1, keepdim=True)
    high = size.masked_fill(~visual, -torch.inf).amax(dim=1, keepdim=True)
    return ((size - low) / (high - low).clamp(min=1e-30)).masked_fill(~visual, -1.0)


def duplication(key: Tensor, value: Tensor, picks: Tensor, scaling: float) -> Tensor:
    """How much each token repeats the picked one that is most like it, squared.

    Args:
        key: (B, KV, N, D), rotated.
        value: (B, KV, N, D).
        picks: (B, P) int64 into N.
        scaling: factor on the dot product, normally ``D ** -0.5``.

    Returns:
        (B, N) float32 in [0, 1].
    """
    batch, kv_heads, n_tokens, _ = key.shape
    unit = torch.nn.functional.normalize(value, dim=3)
    most = key.new_zeros(batch, n_tokens)
    for part in picks.split(max(1, _CHUNK_ELEMENTS // (batch * n_tokens)), dim=1):
        alike = key.new_zeros(batch, n_tokens, part.shape[1])
        for k, v in zip(key.unbind(1), unit.unbind(1), strict=True):
            alike += (v @ take(v, part).transpose(1, 2)) * (-0.5 * scaling * torch.cdist(k, take(k, part)) ** 2).exp()
        most = torch.maximum(most, ((alike / kv_heads) ** 2).amax(dim=2))
    return most


register(
    TextScorer(
        "iwp",
        "IWP (2604.00757): magnitude under the mean text query, less what earlier choices repeat, by queries, keys and "
        "values of decoder layer 5. The paper cuts before that layer, the engine after it",
        text_query_weights,
        score,
        layer=5,
        unrotates=True,
    )
)
