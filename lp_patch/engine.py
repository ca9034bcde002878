"""What a patched model does in a forward: the hooks, and the steps of a prefill in order.

    1 read     what the call shows (`read`): the one wait for the device
    2 plan     on the host (`plan`): lengths and counts; where nothing is to be removed, nothing is refused either
    3 cut      on the device (`cut`): hidden states before the first layer, after layer k, and at the wipe
    4 keys     what each layer attends to (`forward`, `cache`)
    5 outputs  of the input's length (`outputs`)

Stage 1 runs while images are encoded, before the projector, where a family has one that works token by token; else, and
for features from outside, on the merged features. A forward's state is a `Forward`, which reaches the layers as a
keyword; their hooks are on the model only while a forward that needs them is alive, so that decoding calls none in
vain. On a static cache they stay, and are plain enough for dynamo to look into.
"""

import warnings
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from . import cache as kv
from .attention import KEY, install_tap
from .choose import stage1_apart, stage2
from .compat import PREFILL_METHODS, cache_in, causal_mask, uncounted
from .cut import Cut, best_cut, first_cut, keep_cut
from .early import EarlyStage
from .errors import UnsupportedInputError
from .forward import Forward, Tapped
from .install import Installation
from .outputs import finish
from .plan import Feature, Loss, Plan, find_inputs, find_places, make_plan, query_slots, query_weights
from .read import Call, PerThread, Prompt, State, chosen_of
from .refuse import check_call, check_mask, flat_mask
from .registry import Parts
from .select import take
from .settings import Settings
from .step import Step, is_static_step, static_step, tokens_of
from .strategies import SCORERS, Stage2Input
from .trace import InputScores, Record

_NONE = np.zeros(0, dtype=np.int64)


class EngineThread(PerThread):
    """What one thread is doing with the model."""

    record: Record | None = None
    chunk: int | None = None


class EngineState(State):
    """All that changes while a patched model runs."""

    def __init__(self) -> None:
        self.local: EngineThread = EngineThread()
        self.last_record: Record | None = None
        self.warned: set[str] = set()
        self.held = False


class Engine(EarlyStage):
    """The hooks of one patched model."""

    state: EngineState

    def __init__(self, parts: Parts, settings: Settings) -> None:
        super().__init__(parts, EngineState(), settings)
        self.patch: Any = None  # the handle; found again through the hooks, also on a copy of the model

    def __deepcopy__(self, memo: dict) -> "Engine":
        # PEFT copies single modules (modules_to_save): their hooks stay this patch's, and the model is not copied along
        if id(self.parts.model) not in memo and id(self.parts.base) not in memo:
            return self
        copy = memo[id(self)] = Engine.__new__(Engine)
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def install(self, on: Installation) -> None:
        """Put on the model what stays there."""
        super().install(on)
        parts = self.parts
        for name in PREFILL_METHODS:
            if hasattr(parts.model, name):
                on.wrap(parts.model, name, self.around_prefill)
        on.before(parts.language_model, self.before_language_model)
        if self.settings.config.stage_ratio > 1:
            on.note(install_tap(parts.attention[self.settings.shape.layer - 1], self.observe_text))

    def _hook_layers(self) -> list[Any]:
        """Put the layers' hooks on; returns their handles. One that is there twice acts once: the first takes the
        keyword away."""
        return [
            layer.register_forward_pre_hook(partial(self.before_layer, index), with_kwargs=True)
            for index, layer in enumerate(self.parts.layers)
        ]

    # ------------------------------------------------------------------ the whole model

    @torch.compiler.disable
    def around_prefill(self, wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps the prefill of generate(): whether it cuts the prompt into chunks."""
        given = [*args, *kwargs.values()]
        self.state.local.chunk = next((x.prefill_chunk_size for x in given if isinstance(x, GenerationConfig)), None)
        try:
            return wrapped(*args, **kwargs)
        finally:
            self.state.local.chunk = None

    # ------------------------------------------------------------------ the language model

    def before_language_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Cut what is removed out of the sequence, or tell the layers what a pruned cache holds."""
        if not is_static_step(args, kwargs):
            return self._begin(args, kwargs)
        return static_step(module.config, args, kwargs)

    @torch.compiler.disable
    def _begin(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        embeds, cache = kwargs.get("inputs_embeds"), cache_in(kwargs)
        call = self.take_call(embeds)
        if call.shows and not call.features:
            self._warn(
                f"this call shows images, but no features of theirs passed {self.parts.adapter.family}'s "
                f"{' or '.join(m.encode for m in self.parts.modalities)}: nothing is pruned"
            )
        if call.merged_outside and not call.features:
            self._warn(
                "images were encoded outside the model's forward and this call brings inputs_embeds, so they may be merged "
                "already: lp_patch cannot tell where, and prunes nothing. Give input_ids with pixel_values, or leave the "
                "placeholders' embeddings in and pass the features as mm_encoder_outputs"
            )
        if embeds is not None and call.started and call.features:
            return self._prefill(call, args, kwargs)
        tokens = tokens_of(args, kwargs)
        first = cache is None or (isinstance(cache, kv.Cache) and kv.seen_tokens(cache) == 0)
        if tokens is not None and first:
            self._check_merged(call, embeds)
            batch, length = tokens.shape[:2]
            empty = np.zeros((batch, length), dtype=bool)
            self._keep(Record(self.settings.shape, empty, [length] * batch, [False] * batch, []))
        return self._continue(args, kwargs)

    def _check_merged(self, call: Call, embeds: Tensor | None) -> None:
        """Refuse embeddings into which somebody has merged features of which some were never projected."""
        given = (
            embeds is not None and self.parts.projector is not None and (call.embeds is not None or not call.started)
        )
        if given and embeds.isnan().all(dim=-1).any():  # type: ignore[union-attr]
            raise UnsupportedInputError(
                "inputs_embeds holds image features that lp_patch has pruned, already merged. Leave the placeholder "
                "embeddings in and pass the features as mm_encoder_outputs, or encode them with the patch removed"
            )

    def _continue(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A forward without new visual tokens, perhaps on a pruned cache."""
        cache, mask, tokens = cache_in(kwargs), kwargs.get("attention_mask"), tokens_of(args, kwargs)
        if tokens is None or not kv.is_pruned(cache):
            return None
        kv.lead(cache)
        new, kwargs = tokens.shape[1], uncounted(kwargs)
        if kv.is_static(cache):
            self._hold()
            return static_step(self.parts.language_model.config, args, kwargs)
        shift = kv.shift_of(cache)
        if shift is not None:
            kwargs = {
                **kwargs,
                "position_ids": self._position_ids(kwargs, new, tokens.device) - shift.to(tokens.device),
            }
        like = tokens
        if tokens.dim() == 2:
            like = torch.empty((*tokens.shape, 0), dtype=self.parts.language_model.dtype, device=tokens.device)
        config = self.parts.language_model.config
        if new == 1 and mask is None and not kv.is_padded(cache) and causal_mask(config, like, None, 1) is None:
            return args, kwargs  # nobody looks at a mask, so none is of the wrong length
        check_mask(mask, cache, new)
        forward = self._start(Forward(new, flat_mask(mask, cache, new), cache))
        keys = forward.keys_of(config, 0, like)
        return args, {**kwargs, "attention_mask": keys.mask, KEY: forward}

    def _start(self, forward: Forward) -> Forward:
        """Put the layers' hooks on for as long as this forward lives."""
        forward.keep_hooks(self._hook_layers())
        return forward

    def _hold(self) -> None:
        """Keep the layers' hooks on: dynamo must find them whenever it traces a step on a pruned static cache."""
        if not self.state.held:
            self.state.held = True
            self._hook_layers()

    def _prefill(self, call: Call, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A forward with new visual tokens."""
        embeds, cache = kwargs["inputs_embeds"], cache_in(kwargs)
        batch, length = embeds.shape[:2]
        adapter, settings = self.parts.adapter, self.settings
        flat = flat_mask(kwargs.get("attention_mask"), cache, length)
        asking = self.asking_of(call, batch, length, kv.seen_tokens(cache) if isinstance(cache, kv.Cache) else 0)
        prompt = self.read_prompt(call, embeds, None if flat is None else flat[:, -length:], asking, kwargs)
        features = [x for m in prompt.modalities for x in call.features[m.name]]
        facts = [[_facts(x) for x in call.features[m.name]] for m in prompt.modalities]
        inputs = find_inputs(prompt, facts, adapter.merge_adjacent, settings.budget, adapter.split)
        plan = make_plan(inputs, prompt, settings.shape.wipe_layer is not None)
        record = self._keep(Record(settings.shape, plan.visual, plan.text, plan.wiped, []))
        if plan.nothing:
            return self._continue(args, kwargs)
        compact = settings.config.positions == "compact"
        check_call(self.parts, plan, prompt, kwargs, compact, self.state.local.chunk)
        if kv.is_pruned(cache):
            kv.lead(cache)

        forward = Forward(length, flat, cache)
        forward.plan, forward.record = plan, record
        cut = self._first_cut(forward, prompt, features, embeds)
        if plan.cuts:
            self._weigh(forward, prompt, asking is not None)
        ids = self._position_ids(kwargs, length, embeds.device)
        if self.parts.true_positions:
            forward.true_ids = ids
        shift = kv.shift_of(cache)
        if compact:
            ids = ids if shift is None else ids - shift.to(ids.device)
            left = torch.zeros(batch, length + 1, dtype=torch.bool, device=embeds.device)
            left.scatter_(1, cut.where.remainder(length + 1), True)
            visual = torch.from_numpy(plan.visual).to(embeds.device)
            forward.gone = (visual & ~left[:, :length]).cumsum(dim=1)
            shift = forward.gone[:, -1:] + (0 if shift is None else shift.to(embeds.device))
        forward.shift = shift
        shortened = take(embeds, cut.index)
        if cut.valid is not None:
            # padding slots point at any row, and what was not projected is NaN, which would spread through attention
            shortened = shortened.masked_fill(~cut.valid[..., None], 0.0)
        kwargs = {**uncounted(kwargs), **self._deepstack(kwargs, plan, prompt, cut), "inputs_embeds": shortened}
        keys = forward.keys_of(self.parts.language_model.config, 0, shortened)
        # the whole input's position ids: the rotary embedding is made of them, each cut takes its part
        kwargs |= {"attention_mask": keys.mask, "position_ids": ids, KEY: forward}
        self._start(forward)
        if kv.is_static(cache):
            self._hold()
        after = self.parts.language_model.register_forward_hook(self.after_language_model, with_kwargs=True)
        forward.keep_hooks([after])
        self.show_kept(features)
        return args, kwargs

    def _first_cut(self, forward: Forward, prompt: Prompt, features: list[Tensor], embeds: Tensor) -> Cut:
        """Stage 1: choose where that was not done while the images were encoded, then cut."""
        plan = forward.plan
        assert plan is not None and forward.record is not None
        places, length = find_places(plan, prompt), embeds.shape[1]
        late = [x for x in plan.losses if x.feature is None]
        rows = [x.row * length + x.positions for x in late]
        base, holes, offsets, positions, own = _upload(
            [places.base, places.holes, places.offsets, places.positions, np.concatenate(rows) if rows else _NONE],
            embeds.device,
        )
        chosen = None
        if plan.losses:
            indices = iter(self._choose_late(forward.record, late, embeds.flatten(0, 1), own, features))
            found = [
                next(indices)
                if x.feature is None
                else chosen_of(features[x.feature]).index
                if x.known is None
                else torch.from_numpy(x.known)
                for x in plan.losses
            ]
            for x in plan.losses:
                scores = None if x.feature is None else chosen_of(features[x.feature]).scores
                if scores is not None and len(scores) == len(x.positions):
                    forward.record.stage1_scores.append(InputScores(x.row, x.positions, scores))
            numbers = torch.cat([x.to(embeds.device) for x in found])  # type: ignore[union-attr]
            chosen = positions.index_select(0, numbers + offsets)
        visual = torch.from_numpy(plan.visual).to(embeds.device, non_blocking=True)
        cut = first_cut(base, holes, chosen, visual, plan.kept)
        forward.cuts.append(cut)
        forward.record.note_stage1(cut.where)
        return cut

    def _choose_late(
        self, record: Record, late: list[Loss], embeds: Tensor, rows: Tensor, features: list[Tensor]
    ) -> list[Tensor]:
        """Stage 1 on merged features, the `rows` of embeds (B * S, D): for each loss (kept,) int64, ascending."""
        if not late:
            return []
        scorer = self.settings.scorer
        if scorer.reads or (scorer.needs_pruner and self.parts.projector is not None):
            self._warn(
                f'scorer="{scorer.name}" reads the vision encoder, but this call brings features that were encoded '
                'without the patch: they are pruned by "diversity". Encode them with the patched model instead'
            )
            scorer = SCORERS["diversity"]
        sizes = [len(x.positions) for x in late]
        found = list(embeds.index_select(0, rows).split(sizes))
        if self.parts.projector is not None and any(x.isnan().all(dim=-1).any() for x in found):
            raise UnsupportedInputError(
                "these image features have rows of NaN: either lp_patch pruned them and they were copied since, which "
                "loses what was kept (pass them as get_image_features returned them), or the encoder made them"
            )
        indices, scores = stage1_apart(self.settings, scorer, found)
        record.stage1_scores += [
            InputScores(x.row, x.positions, s) for x, s in zip(late, scores, strict=True) if s is not None
        ]
        return indices  # type: ignore[return-value]  # a loss keeps fewer than all

    def _weigh(self, forward: Forward, prompt: Prompt, named: bool) -> None:
        """Who asks in stage 2."""
        cut = forward.cuts[-1]
        weights = query_weights(self.settings.text_scorer.weigh, forward.plan, prompt, named)  # type: ignore[arg-type]
        slots = query_slots(weights, prompt, cut.length)
        if slots is not None:
            forward.weights = torch.from_numpy(slots).to(cut.where.device, non_blocking=True)
            return
        weights = torch.from_numpy(weights).to(cut.where.device, non_blocking=True)
        forward.weights = take(weights, cut.index) * (1 if cut.valid is None else cut.valid)

    @staticmethod
    def _deepstack(kwargs: dict, plan: Plan, prompt: Prompt, cut: Cut) -> dict:
        """DeepStack's arguments, cut: features (V, D) that the first layers add at visual positions, row by row."""
        if kwargs.get("visual_pos_masks") is None:
            return {}
        device = cut.where.device
        at = kwargs["visual_pos_masks"].to(device)
        mask = take(at, cut.index) if cut.valid is None else take(at, cut.index) & cut.valid
        # its slots in order: how many they are is known, the mask need not be asked
        count = sum(plan.kept) - int((prompt.real & ~prompt.placeholders).sum())
        slots = mask.flatten().sort(descending=True, stable=True).indices[:count]
        starts, ranks = _upload(
            [np.arange(len(prompt.real))[:, None] * prompt.real.shape[1], prompt.placeholders.cumsum() - 1], device
        )
        rows = ranks.index_select(0, (cut.index + starts).flatten().index_select(0, slots))
        features = [x.index_select(0, rows.to(x.device)) for x in kwargs["deepstack_visual_embeds"]]
        return {"visual_pos_masks": mask, "deepstack_visual_embeds": features}

    @staticmethod
    def _position_ids(kwargs: dict, new: int, device: torch.device) -> Tensor:
        """(..., B or 1, new) position ids as the caller counts them; the default is transformers' own."""
        ids = kwargs.get("position_ids")
        if ids is not None:
            return ids.to(device)
        seen = kv.seen_tokens(cache_in(kwargs))
        return torch.arange(seen, seen + new, device=device)[None]

    # ------------------------------------------------------------------ the decoder layers

    def before_layer(
        self, index: int, module: nn.Module, args: tuple, kwargs: dict | None = None
    ) -> tuple[tuple, dict] | None:
        """Give decoder layer `index` (from 0) the tokens, mask and positions that are its own."""
        # torch calls a hook without keywords that another thread has just taken off: it was not this forward's
        state = None if kwargs is None else kwargs.get(KEY)
        if kwargs is None or state is None or isinstance(state, Tapped):
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != KEY}
        if isinstance(state, Step):
            return args, {**kwargs, "attention_mask": state.mask(index, kwargs.get("attention_mask"))}
        return self._enter(state, index, args, kwargs)

    @torch.compiler.disable
    def _enter(self, forward: Forward, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Decoder layer `index` of a forward that prunes, or goes on with a pruned cache."""
        hidden, config = args[0], self.parts.language_model.config
        if len(forward.keys) == index and forward.cuts:
            self._cuts_before(forward, index)
        cut = forward.cut_of(index)
        if cut is not None and cut.start == index > 0:
            hidden = take(hidden, cut.index)
        kwargs["attention_mask"] = forward.keys_of(config, index, hidden).mask
        if cut is not None:
            rotary = forward.rotary_of(cut, kwargs["position_embeddings"])
            kwargs["position_embeddings"] = tuple(x.to(hidden.device) for x in rotary)
            kwargs["position_ids"] = forward.ids_of(cut)
        if index == self.settings.shape.layer - 1:
            forward.rotary = kwargs.get("position_embeddings", ())
            if forward.weights is not None:
                kwargs[KEY] = Tapped(forward)
        return (hidden, *args[1:]), kwargs

    def _cuts_before(self, forward: Forward, index: int) -> None:
        """Make the cuts that are due before decoder layer `index`."""
        plan, shape, last = forward.plan, self.settings.shape, forward.cuts[-1]
        assert plan is not None and forward.record is not None
        rows = list(zip(plan.kept, plan.survivors, plan.stage2, plan.wiped, strict=True))
        if index == shape.layer and plan.cuts:
            if forward.scores is None:
                raise UnsupportedInputError(
                    f"decoder layer {index} computed no attention through transformers' AttentionInterface: stage 2 has "
                    "no scores. Set stage_ratio=1 to run stage 1 alone"
                )
            (wanted,) = _upload([np.array(plan.stage2)[:, None]], last.where.device)
            counts = [kept - survivors + stage2 for kept, survivors, stage2, _ in rows]
            scores = forward.scores.to(last.where.device)
            cut, chosen = best_cut(index, last, scores, wanted, counts)
            forward.record.note_stage2(last.where, chosen, scores)
            forward.cuts.append(cut)
            last = cut
        if index == shape.wipe_layer and any(plan.wiped):
            wiped = torch.tensor(plan.wiped, device=last.where.device)[:, None]
            counts = [kept - survivors + (0 if wipe else stage2) for kept, survivors, stage2, wipe in rows]
            forward.cuts.append(keep_cut(index, last, ~(last.visual & wiped), counts))

    def observe_text(self, tapped: Tapped | None, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Layer k's rotated query (B, H, N, D) and key, and value (B, KV, P + N, D): scores of its N tokens."""
        if tapped is not None:
            self._score(tapped.forward, query, key, value, scaling)

    @torch.compiler.disable
    def _score(self, forward: Forward, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        if forward.scores is not None:
            return  # gradient checkpointing runs the layer again
        weights, keys, cut = forward.weights, forward.keys[-1], forward.cuts[-1]
        assert weights is not None and forward.plan is not None
        given = Stage2Input(
            query=query[:, :, query.shape[2] - weights.shape[1] :],
            key=key[:, :, : keys.length],
            value=value[:, :, : keys.length],
            key_mask=None if keys.valid is None else keys.valid.to(key.device),
            weights=weights.to(query.device),
            scaling=scaling,
            visual=cut.visual.to(key.device),
            keep=max(forward.plan.stage2),
            rotary=forward.rotary,
        )
        forward.scores = stage2(self.settings, given)

    @torch.compiler.disable
    def after_language_model(self, module: nn.Module, args: tuple, kwargs: Any, output: Any = None) -> None:
        """Outputs of the input's length; a cache that knows what it was not given."""
        forward = kwargs.get(KEY) if isinstance(kwargs, dict) else None  # as in `before_layer`
        if isinstance(forward, Forward) and forward.cuts and not forward.done:
            forward.done = True
            finish(forward, output)

    # ------------------------------------------------------------------ what users read

    def _keep(self, record: Record) -> Record:
        self.state.local.record = self.state.last_record = record
        return record

    @property
    def record(self) -> Record | None:
        """This thread's latest prefill, or the latest of any thread (a model that generates in a thread)."""
        return self.state.local.record or self.state.last_record

    def _warn(self, message: str) -> None:
        if message not in self.state.warned:
            self.state.warned.add(message)
            warnings.warn(message, stacklevel=2)


def _facts(feature: Tensor) -> Feature:
    """A feature (N, D) as numbers."""
    index = chosen_of(feature).index
    rows = feature.shape[:-1].numel()
    return Feature(rows, None if index is None else len(index), lambda: index.cpu().numpy())  # type: ignore[union-attr]


def _upload(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """int64 arrays on the device, in one transfer that the host does not wait for."""
    whole = torch.from_numpy(np.concatenate([x.reshape(-1) for x in arrays])).to(device, non_blocking=True)
    parts = whole.split([x.size for x in arrays])
    return [part.view(x.shape) for part, x in zip(parts, arrays, strict=True)]
