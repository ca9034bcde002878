"""What a prefill that is to be pruned cannot be given, with what to do; asked once something will be removed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import cache as kv
from .compat import PACKED_KEYWORDS, cache_in
from .errors import UnsupportedInputError
from .plan import Plan
from .prompt import Prompt
from .registry import FULL, Parts


def check_call(
    parts: Parts, plan: Plan, prompt: Prompt, kwargs: dict, compact: bool, chunk: int | None, masked: bool
) -> None:
    """Refuse a forward that pruning would make wrong.

    Args:
        kwargs: of the language model's forward.
        compact: whether survivors are to be numbered consecutively.
        chunk: into how many tokens generate() cuts the prompt, or None.
        masked: whether masks say what its layers look at.
    """
    cache, family = cache_in(kwargs), parts.adapter.family
    refuse_chunks(chunk)
    if parts.adapter.split is not None and prompt.ids is None:
        raise UnsupportedInputError(
            f"{family} tells a prompt's images apart by its token ids: give input_ids, not inputs_embeds"
        )
    check_mask(kwargs.get("attention_mask"), cache, prompt.real.shape[1])
    packed = [name for name in PACKED_KEYWORDS if kwargs.get(name) is not None]
    if packed or (kwargs.get("attention_mask") is None and prompt.jumps is not None and prompt.jumps.any()):
        why = f"got {', '.join(packed)}" if packed else "position_ids with gaps and no attention mask"
        raise UnsupportedInputError(
            f"several sequences packed into one row, which pruning would join ({why}): give each sequence its own row, "
            "with an attention mask"
        )
    kv.check_prunable(cache)
    for kind, layer in zip(parts.kinds.names, getattr(cache, "layers", ()), strict=False):
        if kind == FULL and getattr(layer, "is_sliding", False):
            raise UnsupportedInputError(
                f"this cache has a {type(layer).__name__}, which forgets tokens, for a layer that has no window: the "
                "config carries a sliding_window that no layer reads. Set it to None, or pass a DynamicCache()"
            )
    ids = kwargs.get("position_ids")
    if compact and ids is not None and ids.dim() > 2:
        raise UnsupportedInputError(
            f'positions="compact" has no meaning for the {ids.shape[0]} axes of position ids of {family}: use '
            'positions="original"'
        )
    if compact and prompt.jumps is not None and prompt.jumps.any():
        raise UnsupportedInputError(
            'positions="compact" numbers the survivors consecutively, but the given position_ids have gaps: use '
            'positions="original", or leave position_ids out'
        )
    if parts.true_positions and "flash" in (parts.language_model.config._attn_implementation or ""):
        raise UnsupportedInputError(
            f"the layers of {type(parts.language_model).__name__} compute with position ids, and FlashAttention takes "
            'the gaps in those of the survivors for packed sequences: use model.set_attn_implementation("sdpa")'
        )
    if masked:
        refuse_counting(parts)
    if masked and compact:
        raise UnsupportedInputError(
            f'positions="compact" has no meaning for {family}, whose masks count tokens: use positions="original"'
        )
    if masked and kv.is_static(cache) and kv.seen_tokens(cache):
        raise UnsupportedInputError(
            f"layers of {family} look at a part of the tokens before them, which allows no new pictures on a static "
            "cache that holds tokens: use a dynamic one"
        )
    empty = np.array(plan.wiped) & (np.array(plan.text) == 0)
    if empty.any():
        raise UnsupportedInputError(
            f"row {int(empty.argmax())} holds pictures alone: final_wipe_layer would leave nothing of it. Add text to "
            "the prompt, or leave final_wipe_layer out"
        )


def refuse_counting(parts: Parts) -> None:
    """Refuse a back-end that counts itself what is in a window, among tokens of which some are gone."""
    implementation = parts.language_model.config._attn_implementation or ""
    if "flash" in implementation or "flex" in implementation:
        raise UnsupportedInputError(
            f"layers of {parts.adapter.family} look at a part of the tokens before them (windows, or blocks of image "
            f'tokens), which {implementation} counts after pruning: use model.set_attn_implementation("sdpa")'
        )


def refuse_chunks(chunk: int | None) -> None:
    """Refuse a prompt that generate() cuts into so many tokens at a time."""
    if chunk is not None:
        raise UnsupportedInputError(
            f"prefill_chunk_size={chunk} cuts the prompt between its images and the question, which stage 2 needs "
            "together: pass prefill_chunk_size=None, or remove the patch"
        )


def all_real(mask: Any) -> bool:
    """Whether a mask (B, tokens) hides nothing. It waits for the device, as transformers does before it drops one."""
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all()))


def flat_mask(mask: Any, cache: Any, new: int) -> Tensor | None:
    """The mask as (B, tokens seen + new), or None if all are real, or if that cannot be told.

    For a static cache, generate() brings one over all slots: nobody attends to what is padding.
    """
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    mask = _full_mask(mask, cache)
    if isinstance(mask, Tensor) and mask.dim() == 4 and kv.is_static(cache):
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        columns = kv.seen_tokens(cache) + new
        return seen.any(dim=1).any(dim=1)[:, :columns]
    return None


def check_mask(mask: Any, cache: Any, new: int) -> None:
    """Refuse masks from which nobody can tell what is padding."""
    if _full_mask(mask, cache) is None or flat_mask(mask, cache, new) is not None:
        return
    raise UnsupportedInputError(
        "a pruned prompt needs the 2-D attention mask (batch, tokens) or None, got "
        + (f"one of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__)
        + (
            ", which generate() made for a static cache: use a dynamic one, or another attn_implementation"
            if kv.is_static(cache)
            else ""
        )
    )


def _full_mask(mask: Any, cache: Any) -> Any:
    """Of the masks by layer type that generate() may bring for a static cache that of full attention."""
    if isinstance(mask, dict) and "full_attention" in mask and kv.is_static(cache):
        return mask["full_attention"]
    return mask
