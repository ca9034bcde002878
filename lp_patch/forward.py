"""One forward of the language model: its state, which travels with it as a keyword, and what each layer attends to."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import cache as kv
from .attention import KEY, Attended
from .choose import stage2
from .cut import Cut, best_cut, keep_cut, take_rows, take_tokens, upload
from .errors import UnsupportedInputError
from .keys import KeyFinder, Keys
from .plan import Plan
from .registry import RECURRENT, Kinds
from .select import take
from .settings import Settings
from .strategies import Stage2Input
from .trace import Record


class Forward:
    """What a forward that prunes, or goes on with a pruned cache, has decided; no dataclass: wrappers pass it on whole.

    Attributes:
        new: tokens as the caller counts them.
        flat: (B, seen + new), the caller's attention mask, or None if all are real.
        cuts: so far, the latest last; none where a forward only goes on with a cache.
        keys: of the layers so far; found once, as before 5.18 gradient checkpointing calls hooks again.
        weights: (B, Q) float32, how much each of the last tokens asks, or None if stage 2 removes nothing.
        scores: (B, N) float32 of stage 2, once its layer has run.
        rotary: cos and sin that layer k was given.
        gone: (B, S) int64, how many tokens stage 1 removed up to each position, for compact positions, or None.
        shift: (B, 1) int64, what compact positions lag behind original ones from now on, or None.
        done: whether its output was given back in the input's length.
        true_ids: (..., B or 1, S) position ids for layers that compute with them, or None.
        finder: finds what its layers attend to.
    """

    def __init__(self, settings: Settings, new: int, flat: Tensor | None, cache: Any) -> None:
        self.settings = settings
        self.kinds: Kinds = settings.kinds
        self.new, self.flat, self.cache = new, flat, cache
        self.past = kv.stored_tokens(cache, self.kinds.first)
        self.finder = KeyFinder(settings.kinds, cache, new, flat)
        self.plan: Plan | None = None
        self.record: Record | None = None
        self.cuts: list[Cut] = []
        self.keys: list[Keys] = []
        self.weights: Tensor | None = None
        self.scores: Tensor | None = None
        self.rotary: tuple[Tensor, ...] = ()
        self.gone: Tensor | None = None
        self.shift: Tensor | None = None
        self.done = False
        self.true_ids: Tensor | None = None
        self._slots: dict[tuple, kv.Slots] = {}
        self._rotary: dict[tuple, tuple[Tensor, ...]] = {}
        self._ids: dict[int, Tensor] = {}

    def keep_hooks(self, remove: Callable[[], None]) -> None:
        """Hooks that stay as long as this forward does: until it has ended, and its gradient is not needed any more."""
        weakref.finalize(self, remove).atexit = False

    def cut_of(self, index: int) -> Cut | None:
        """The cut that layer `index` runs on, or None if this forward cuts nothing."""
        for cut in reversed(self.cuts):
            if cut.start <= index:
                return cut
        return None

    def keys_of(self, config: Any, index: int, hidden: Tensor, given: Any = None) -> Keys:
        """What layer `index` attends to.

        Args:
            config: of the language model.
            hidden: (B, N, C) or longer, on the layer's device and in its dtype.
            given: the mask that the layer was handed.
        """
        if len(self.keys) > index:
            return self.keys[index]
        source = self.kinds.sources[index]
        # a layer that shares keys comes after its source, whose cache has grown since
        self.keys.append(self._new_keys(config, index, hidden, given) if source == index else self.keys[source])
        return self.keys[index]

    def mask_for_all(self, config: Any, hidden: Tensor) -> Any:
        """The mask of the first layer with keys, for a language model that looks at one before its layers do."""
        return self.finder.plain(config, self.kinds.first, hidden, self.cuts[-1] if self.cuts else None).mask

    def _new_keys(self, config: Any, index: int, hidden: Tensor, given: Any) -> Keys:
        cut, cache = (self.cuts[-1] if self.cuts else None), self.cache
        keys = self.finder.find(config, index, hidden, given, cut)
        if cut is not None and self.plan is not None and kv.is_static(cache) and self.kinds.names[index] != RECURRENT:
            key = self.finder.history(index, cut)
            self._slots[key] = kv.prepare_slots(
                cache, index, cut.where, cut.pick, self.past, self.new, self.plan.tail, self._slots.get(key)
            )
        return keys

    def enter(self, config: Any, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of decoder layer `index`: its own tokens, mask and positions; `config`: of its model."""
        hidden, streams = args[0], self.settings.streams
        if len(args) > 1:  # some models name no arguments
            kwargs |= dict(zip(self.settings.arguments[1:], args[1:], strict=False))
        if len(self.keys) == index and self.cuts:
            self._cuts_before(index)
        cut = self.cut_of(index)
        if cut is not None and cut.start == index > 0:
            hidden = take_tokens(hidden, cut.index, streams)
        tokens = hidden[0] if streams else hidden
        kwargs["attention_mask"] = self.keys_of(config, index, tokens, kwargs.get("attention_mask")).mask
        if cut is not None:
            for name in self.settings.per_token:
                if name in kwargs:
                    kwargs[name] = self._of_later_cuts(cut, kwargs[name])
            if kwargs.get("position_embeddings") is not None:  # some layers take none
                rotary = self.rotary_of(cut, kwargs["position_embeddings"])
                if rotary[0].device != hidden.device:
                    rotary = tuple(x.to(hidden.device) for x in rotary)
                kwargs["position_embeddings"] = rotary
            kwargs["position_ids"] = self.ids_of(cut)
        if index == self.settings.shape.layer - 1:
            self.rotary = kwargs.get("position_embeddings") or ()
            if self.weights is not None:
                kwargs[KEY] = Tapped(self)
        return (hidden,), kwargs

    def _of_later_cuts(self, cut: Cut, x: Tensor | None) -> Tensor | None:
        """What is left of x (B, N, ...), a row for each token that stage 1 left, in a layer of this cut."""
        for later in self.cuts[1:]:
            if x is not None and later.start <= cut.start:
                x = take(x, later.index.to(x.device))
        return x

    def _cuts_before(self, index: int) -> None:
        """Make the cuts that are due before decoder layer `index`."""
        plan, shape, last = self.plan, self.settings.shape, self.cuts[-1]
        assert plan is not None and self.record is not None
        rows = list(zip(plan.kept, plan.survivors, plan.stage2, plan.wiped, strict=True))
        if index == shape.layer and plan.cuts:
            if self.scores is None:
                raise UnsupportedInputError(
                    f"decoder layer {index} computed no attention through transformers' AttentionInterface: stage 2 "
                    "has no scores. Set stage_ratio=1 to run stage 1 alone"
                )
            wanted: int | Tensor = plan.stage2[0]
            if len(set(plan.stage2)) > 1:
                (wanted,) = upload([np.array(plan.stage2)[:, None]], last.where.device)
            counts = [kept - survivors + stage2 for kept, survivors, stage2, _ in rows]
            scores = self.scores.to(last.where.device)
            cut, chosen = best_cut(index, last, scores, wanted, counts)
            self.record.note_stage2(last.where, chosen, scores)
            self.cuts.append(cut)
            last = cut
        if index == shape.wipe_layer and any(plan.wiped):
            keep = ~last.visual
            if not all(plan.wiped):
                (whole,) = upload([1 - np.array(plan.wiped)[:, None].astype(np.int64)], last.where.device)
                keep = keep | whole.bool()
            counts = [kept - survivors + (0 if wipe else stage2) for kept, survivors, stage2, wipe in rows]
            self.cuts.append(keep_cut(index, last, keep, counts))

    def observe(self, seen: Attended) -> None:
        """Layer k's query (B, H, N, D), and keys and values (B, KV, P + N, D): scores of its N tokens."""
        if self.scores is not None:
            return  # gradient checkpointing runs the layer again
        weights, keys, cut = self.weights, self.keys[-1], self.cuts[-1]
        assert weights is not None and self.plan is not None
        query, key, mask = seen.query, seen.key, seen.mask
        key_mask = None if keys.valid is None else keys.valid.to(key.device)
        if self.finder.masked and isinstance(mask, Tensor):  # what these queries see is no matter of order alone
            rows = mask[:, 0, -weights.shape[1] :, : keys.length].to(key.device)
            key_mask = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
        given = Stage2Input(
            query=query[:, :, query.shape[2] - weights.shape[1] :],
            key=key[:, :, : keys.length],
            value=seen.value[:, :, : keys.length],
            key_mask=key_mask,
            weights=weights.to(query.device),
            scaling=seen.scaling,
            sinks=seen.sinks,
            visual=cut.visual.to(key.device),
            keep=max(self.plan.stage2),
            rotary=self.rotary,
        )
        self.scores = stage2(self.settings, given)

    def rotary_of(self, cut: Cut, rotary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A cut's part of the rotary embedding of the whole input, (..., B or 1, S, D) each; layers share it."""
        key = (cut.start, cut.length, *map(id, rotary))
        if key not in self._rotary:
            self._rotary[key] = tuple(take_rows(x, self._places(cut)) for x in rotary)
        return self._rotary[key]

    def _places(self, cut: Cut) -> Tensor:
        """(B, N) int64: whose position in the whole input each token of a cut has; its own, unless it is compact."""
        index = cut.where if cut.valid is None else cut.where.clamp(min=0)
        return index if self.gone is None else (index - self.gone.gather(1, index)).clamp(min=0)

    def ids_of(self, cut: Cut) -> Tensor | None:
        """(B, N) position ids for a layer of this cut that computes with them, else None.

        FlashAttention takes a gap in them for a packed sequence, and asks the device for one in every layer.
        """
        if self.true_ids is None:
            return None
        if cut.start not in self._ids:
            lead = self.true_ids.shape[:-2]  # several axes
            places = self._places(cut).expand(*lead, -1, -1)
            self._ids[cut.start] = self.true_ids.expand(*lead, len(cut.where), -1).gather(-1, places)
        return self._ids[cut.start]


class Tapped:
    """A forward on its way to the tap inside a layer: the layer's own hook has done its part."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
