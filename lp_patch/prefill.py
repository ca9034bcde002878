"""The device's part of a prefill before the first layer: what is chosen, who asks, what comes out of the sequence."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import cache as kv
from .choose import stage1_apart
from .compat import cache_in, uncounted
from .cut import Cut, first_cut, left_mask, upload
from .errors import UnsupportedInputError
from .forward import Forward
from .plan import Feature, Loss, Places, Plan, asking_tokens, query_slots
from .prompt import Prompt
from .read import chosen_of
from .registry import Parts
from .select import take, true_slots
from .strategies import SCORERS
from .trace import InputMixtures, InputScores

_NONE = np.zeros(0, dtype=np.int64)


def facts_of(feature: Tensor) -> Feature:
    """A feature (N, D) as numbers."""
    index = chosen_of(feature).rows
    rows = feature.shape[:-1].numel()
    return Feature(rows, None if index is None else len(index), lambda: index.cpu().numpy())  # type: ignore[union-attr]


def cut_input(
    forward: Forward, places: Places, features: list[Tensor], embeds: Tensor, early: bool, warn: Callable[[str], None]
) -> Cut:
    """Stage 1: choose where that was not done while the images were encoded, then cut.

    Args:
        features: (N, D) each, in the order of the plan's numbers.
        embeds: (B, S, D), merged.
        early: whether this family's stage 1 reads what comes before its projector.
    """
    plan = forward.plan
    assert plan is not None and forward.record is not None
    length = embeds.shape[1]
    late = [x for x in plan.losses if x.feature is None]
    rows = [x.row * length + x.positions for x in late]
    base, holes, offsets, positions, own = upload(
        [places.base, places.holes, places.offsets, places.positions, np.concatenate(rows) if rows else _NONE],
        embeds.device,
    )
    chosen = None
    if plan.losses:
        indices = iter(_choose_late(forward, late, embeds.flatten(0, 1), own, early, warn))
        found = [
            next(indices)
            if x.feature is None
            else chosen_of(features[x.feature]).rows
            if x.known is None
            else torch.from_numpy(x.known)
            for x in plan.losses
        ]
        for x in plan.losses:
            scores = None if x.feature is None else chosen_of(features[x.feature]).scores
            if scores is not None and len(scores) == len(x.positions):
                forward.record.stage1_scores.append(InputScores(x.row, x.positions, scores))
            weights = None if x.feature is None else chosen_of(features[x.feature]).weights
            if weights is not None and weights.shape == (x.kept, len(x.positions)):
                forward.record.mixtures.append(InputMixtures(x.row, x.positions, weights.detach()))
        numbers = torch.cat([x.to(embeds.device, non_blocking=True) for x in found])  # type: ignore[union-attr]
        chosen = positions.index_select(0, numbers + offsets)
    visual = torch.from_numpy(plan.visual).to(embeds.device, non_blocking=True)
    cut = first_cut(base, holes, chosen, visual, plan.kept)
    forward.cuts.append(cut)
    forward.record.note_stage1(cut.where)
    return cut


def _choose_late(
    forward: Forward, late: list[Loss], embeds: Tensor, rows: Tensor, early: bool, warn: Callable[[str], None]
) -> list[Tensor]:
    """Stage 1 on merged features, the `rows` of embeds (B * S, D): for each loss (kept,) int64, ascending."""
    if not late:
        return []
    settings, record = forward.settings, forward.record
    scorer = settings.scorer
    assert record is not None
    if scorer.reads or scorer.mix or (scorer.needs_pruner and early):
        warn(
            f'scorer="{scorer.name}" reads the vision encoder, but this call brings features that were encoded '
            'without the patch: they are pruned by "diversity". Encode them with the patched model instead'
        )
        scorer = SCORERS["diversity"]
    sizes = [len(x.positions) for x in late]
    found = list(embeds.index_select(0, rows).split(sizes))
    if early and any(x.isnan().all(dim=-1).any() for x in found):
        raise UnsupportedInputError(
            "these image features have rows of NaN: either lp_patch pruned them and they were copied since, which "
            "loses what was kept (pass them as get_image_features returned them), or the encoder made them"
        )
    answers = stage1_apart(settings, scorer, found)
    record.stage1_scores += [
        InputScores(x.row, x.positions, s) for x, (_, s, _) in zip(late, answers, strict=True) if s is not None
    ]
    return [index for index, _, _ in answers]  # type: ignore[misc]  # a loss keeps fewer than all


def weigh_queries(forward: Forward, prompt: Prompt, weights: np.ndarray) -> Tensor:
    """How much each of the last Q tokens asks in stage 2: (B, Q) float32, from `weights` (B, S) of the input's."""
    cut, weigh = forward.cuts[-1], forward.settings.text_scorer.weigh
    slots = query_slots(weights, prompt, cut.length)
    if slots is not None:
        return torch.from_numpy(slots).to(cut.where.device, non_blocking=True)
    # a strategy in which other tokens ask, perhaps some that were removed: it must know which are left
    length, device = prompt.real.shape[1], cut.where.device
    left = left_mask(cut.where, length)
    text, visual = (torch.from_numpy(x).to(device, non_blocking=True) for x in asking_tokens(prompt))
    asked = take(weigh(text, visual, left) * left * visual.any(dim=1, keepdim=True), cut.index)
    return asked if cut.valid is None else asked * cut.valid


def position_ids(kwargs: dict, new: int, device: torch.device) -> Tensor:
    """(..., B or 1, new) position ids as the caller counts them; the default is transformers' own."""
    ids = kwargs.get("position_ids")
    if ids is not None:
        return ids.to(device)
    seen = kv.seen_tokens(cache_in(kwargs))
    return torch.arange(seen, seen + new, device=device)[None]


def place(forward: Forward, ids: Tensor, compact: bool, true: bool) -> Tensor:
    """Where survivors of the first cut stand: the whole input's ids (..., B or 1, S), less what a pruned cache lags.

    Args:
        compact: whether they are numbered consecutively.
        true: whether the layers compute with ids themselves.
    """
    shift, cut, plan, length = kv.shift_of(forward.cache), forward.cuts[0], forward.plan, ids.shape[-1]
    assert plan is not None
    if compact:
        ids = ids if shift is None else ids - shift.to(ids.device)
        visual = torch.from_numpy(plan.visual).to(ids.device, non_blocking=True)
        forward.gone = (visual & ~left_mask(cut.where, length)).cumsum(dim=1)
        shift = forward.gone[:, -1:] + (0 if shift is None else shift.to(ids.device))
    forward.shift = shift
    if true:
        forward.true_ids = ids
    return ids


def cut_arguments(forward: Forward, parts: Parts, prompt: Prompt, embeds: Tensor, kwargs: dict) -> dict:
    """The language model's arguments for what stage 1 leaves of its input (B, S, D), but for mask and positions."""
    cut, plan = forward.cuts[0], forward.plan
    assert plan is not None
    if cut.valid is None:
        shortened = take(embeds, cut.index)
    else:
        # padding repeats the row's first token: any other may be NaN, as it was not projected, which would spread; and
        # zeros have no gradient in some norms
        shortened = take(embeds, cut.index.gather(1, cut.pick))  # type: ignore[arg-type]
        shortened = torch.where(cut.valid[..., None], shortened, shortened.nan_to_num())
    own = {name: take(kwargs[name], cut.index) for name in parts.adapter.per_token if kwargs.get(name) is not None}
    return {**uncounted(kwargs), **cut_deepstack(kwargs, plan, prompt, cut), **own, "inputs_embeds": shortened}


def cut_deepstack(kwargs: dict, plan: Plan, prompt: Prompt, cut: Cut) -> dict:
    """DeepStack's arguments, cut: features (V, D) that the first layers add at visual positions, row by row."""
    if kwargs.get("visual_pos_masks") is None:
        return {}
    device = cut.where.device
    at = kwargs["visual_pos_masks"].to(device)
    mask = take(at, cut.index) if cut.valid is None else take(at, cut.index) & cut.valid
    # its slots in order: how many they are is known, the mask need not be asked
    count = sum(plan.kept) - int((prompt.real & ~prompt.placeholders).sum())
    slots = true_slots(mask.flatten(), count)
    starts, ranks = upload(
        [np.arange(len(prompt.real))[:, None] * prompt.real.shape[1], prompt.placeholders.cumsum() - 1], device
    )
    rows = ranks.index_select(0, (cut.index + starts).flatten().index_select(0, slots))
    features = [x.index_select(0, rows.to(x.device)) for x in kwargs["deepstack_visual_embeds"]]
    return {"visual_pos_masks": mask, "deepstack_visual_embeds": features}
