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

from . import cache as kv
from .attention import KEY, Attended, install_tap
from .compat import cache_in, causal_mask, full_masks, uncounted
from .errors import UnsupportedInputError
from .forward import Forward, Tapped
from .install import Installation, LayerHooks
from .outputs import finish
from .planning import EngineState, Planner
from .prefill import cut_arguments, cut_input, place, position_ids, weigh_queries
from .read import ENCODED, Call, is_made
from .refuse import all_real, check_call, check_mask, flat_mask, refuse_counting
from .registry import RECURRENT, Parts
from .settings import Settings
from .step import Step, is_static_step, static_step, tokens_of
from .trace import Record


class Engine(Planner):
    """The hooks of one patched model."""

    state: EngineState

    def __init__(self, parts: Parts, settings: Settings) -> None:
        super().__init__(parts, EngineState(), settings)
        self.patch: Any = None  # the handle; found again through the hooks, also on a copy of the model
        self._hooks: LayerHooks | None = None

    def __deepcopy__(self, memo: dict) -> "Engine":
        # PEFT copies single modules (modules_to_save): their hooks stay this patch's, and the model is not copied along
        if id(self.parts.model) not in memo and id(self.parts.base) not in memo:
            return self
        copy = memo[id(self)] = type(self).__new__(type(self))
        copy.__dict__.update(deepcopy({**self.__dict__, "_hooks": None}, memo))
        return copy

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_hooks": None}

    def install(self, on: Installation) -> None:
        """Put on the model what stays there."""
        super().install(on)
        on.before(self.parts.language_model, self.before_language_model)
        if self.settings.config.stage_ratio > 1:
            on.note(install_tap(self.parts.attention[self.settings.shape.layer - 1], self.observe_text))

    def _layer_hooks(self) -> LayerHooks:
        """The layers' hooks; one that is there twice acts once: the first takes the keyword away."""
        if self._hooks is None:
            self._hooks = LayerHooks(
                [(layer, partial(self.before_layer, index)) for index, layer in enumerate(self.parts.layers)]
            )
        return self._hooks

    # ------------------------------------------------------------------ the language model

    def before_language_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Cut what is removed out of the sequence, or tell the layers what a pruned cache holds."""
        if not is_static_step(args, kwargs):
            return self._begin(module, args, kwargs)
        if not self.state.held and kv.is_pruned(cache_in(kwargs)):
            self._hold()  # pruned under another patch
        return static_step(module.config, args, kwargs)

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        embeds, cache = kwargs.get("inputs_embeds"), cache_in(kwargs)
        call = self.take_call(embeds)
        if call.shows and not call.features:
            self._warn(
                f"this call shows images, but no features of theirs passed {self.parts.adapter.family}'s "
                f"{' or '.join(m.encode for m in self.parts.modalities)}: nothing is pruned"
            )
        if call.merged_outside and not call.features:
            self._check_merged(call, embeds)
            self._warn(
                "images were encoded outside the model's forward and this call brings inputs_embeds, into which they "
                "may be merged: lp_patch cannot tell where, and prunes nothing. Give input_ids with pixel_values, or "
                "leave the placeholders' embeddings in and pass the features as mm_encoder_outputs"
            )
        if embeds is not None and call.started and call.features:
            return self._prefill(call, args, kwargs)
        if call.features and not call.started:
            self._warn(
                f"{type(module).__name__} was called past the forward of {type(self.parts.base).__name__}, after "
                "images were encoded: by a generate() of the model's own? Nothing is pruned there"
            )
        tokens = tokens_of(args, kwargs)
        first = cache is None or (isinstance(cache, kv.Cache) and kv.seen_tokens(cache) == 0)
        if tokens is not None and first:
            self._check_merged(call, embeds)
            batch, length = tokens.shape[:2]
            empty = np.zeros((batch, length), dtype=bool)
            self._keep(Record(self.settings.shape, empty, [length] * batch, [False] * batch, []))
        return self._continue(call, args, kwargs)

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

    def _continue(self, call: Call, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A forward without new visual tokens, perhaps on a pruned cache."""
        cache, tokens = cache_in(kwargs), tokens_of(args, kwargs)
        if tokens is None or not kv.is_pruned(cache):
            return None
        mask = call.mask_for(kwargs.get("attention_mask"))
        kv.lead(cache)
        new, kwargs = tokens.shape[1], uncounted(kwargs)
        if kv.is_static(cache):
            self._hold()
            return static_step(self.parts.language_model.config, args, kwargs)
        shift = kv.shift_of(cache)
        if shift is not None:
            kwargs = {
                **kwargs,
                "position_ids": position_ids(kwargs, new, tokens.device) - shift.to(tokens.device),
            }
        like = tokens
        if tokens.dim() == 2:
            like = torch.empty((*tokens.shape, 0), dtype=self.parts.language_model.dtype, device=tokens.device)
        config = self.parts.language_model.config
        tracked = kv.keeps_positions(cache)
        seen = kv.seen_tokens(cache) if tracked else 0
        masked = tracked and (mask is not kwargs.get("attention_mask") or self.settings.kinds.reached(seen + new))
        # transformers makes a mask from as many tokens on as a window has
        unseen = not masked and not (tracked and self.settings.kinds.reached(seen + new + 1))
        if masked:
            refuse_counting(self.parts)
        if (
            unseen
            and new == 1
            and not kv.is_padded(cache)
            and causal_mask(config, like, None, 1) is None
            and all_real(mask)
        ):
            return args, {**kwargs, "attention_mask": None}  # nobody looks at a mask, so none is of the wrong length
        check_mask(mask, cache, new)
        forward = self._start(Forward(self.settings, new, flat_mask(mask, cache, new), cache))
        if tracked:
            forward.finder.track(masked, seen)
        if not masked:  # else the model makes masks for all tokens seen
            kwargs["attention_mask"] = forward.mask_for_all(config, like)
        return args, {**kwargs, KEY: forward}

    def _start(self, forward: Forward) -> Forward:
        """Put the layers' hooks on for as long as this forward lives."""
        forward.keep_hooks(self._layer_hooks().put())
        return forward

    def _hold(self) -> None:
        """Keep the layers' hooks on: dynamo must find them whenever it traces a step on a pruned static cache."""
        if not self.state.held:
            self.state.held = True
            self._layer_hooks().put()

    def _prefill(self, call: Call, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A forward with new visual tokens."""
        embeds, cache = kwargs["inputs_embeds"], cache_in(kwargs)
        length, settings = embeds.shape[1], self.settings
        given = kwargs.get("attention_mask")
        mask = call.mask_for(given)
        if call.planned is None or call.read_mask is not mask:
            call.host = self._read(call, embeds, embeds.shape[:2], {**kwargs, "attention_mask": mask})
            call.planned = self._plan(call)
        flat, prompt, plan, places, weights = call.planned
        features = [x for m in prompt.modalities for x in call.features[m.name]]
        record = self._keep(Record(settings.shape, plan.visual, plan.text, plan.wiped, []))
        record.modalities = {m.name: x & plan.visual for m, x in zip(prompt.modalities, prompt.masks, strict=True)}
        record.note_encoded([x for feature in features for x in getattr(feature, ENCODED, ())])
        if plan.nothing:
            return self._continue(call, args, kwargs)
        compact = settings.config.positions == "compact"
        kinds = settings.kinds
        # masks that the merging module made, or generate() for a static cache
        made = mask is not given or (self.parts.blocks and is_made(given))
        # a static cache is asked for it on its device: not in vain
        seen = kv.seen_tokens(cache) if (made or kinds.masked) and isinstance(cache, kv.Cache) else 0
        masked = made or kinds.reached(seen + length)
        check_call(
            self.parts, plan, prompt, {**kwargs, "attention_mask": mask}, compact, self.state.local.chunk, masked
        )
        if kv.is_pruned(cache):
            kv.lead(cache)
        if kv.is_static(cache):
            kv.unroll(cache)

        forward = Forward(settings, length, flat, cache)
        forward.plan, forward.record = plan, record
        if masked or kinds.masked:
            forward.finder.track(masked, seen)
        assert places is not None
        cut_input(forward, places, features, embeds, self.parts.projector is not None, self._warn)
        if weights is not None:
            forward.weights = weigh_queries(forward, prompt, weights)
        # the whole input's position ids: the rotary embedding is made of them, each cut takes its part
        ids = place(forward, position_ids(kwargs, length, embeds.device), compact, self.parts.true_positions)
        kwargs = cut_arguments(forward, self.parts, prompt, embeds, kwargs)
        config = self.parts.language_model.config
        if not masked:
            given = forward.mask_for_all(config, kwargs["inputs_embeds"])
        elif not made:
            given = full_masks(config, embeds, flat, seen)
        kwargs |= {"attention_mask": given, "position_ids": ids, KEY: forward}
        self._start(forward)
        if kv.is_static(cache):
            self._hold()
        after = self.parts.language_model.register_forward_hook(
            self.after_language_model, with_kwargs=True, prepend=True
        )
        forward.keep_hooks(after.remove)
        self.show_kept(features)
        return args, kwargs

    # ------------------------------------------------------------------ the decoder layers

    def before_layer(
        self, index: int, module: nn.Module, args: tuple, kwargs: dict | None = None
    ) -> tuple[tuple, dict] | None:
        """Give decoder layer `index` (from 0) the tokens, mask and positions that are its own."""
        # torch calls a hook without keywords that another thread has just taken off: it was not this forward's
        state = None if kwargs is None else kwargs.get(KEY)
        if kwargs is None or state is None or type(state) is Tapped:
            return None
        kwargs = dict(kwargs)
        del kwargs[KEY]
        if type(state) is Step:
            if self.settings.kinds.names[index] != RECURRENT:
                kwargs["attention_mask"] = state.mask(index, kwargs.get("attention_mask"))
            return args, kwargs
        enter = _enter if torch.compiler.is_compiling() else type(state).enter
        return enter(state, self.parts.language_model.config, index, args, kwargs)

    def observe_text(self, tapped: Tapped | None, seen: Attended) -> None:
        """Layer k's query (B, H, N, D), and keys and values (B, KV, P + N, D): scores of its N tokens."""
        if tapped is not None:
            observe = _observe if torch.compiler.is_compiling() else type(tapped.forward).observe
            observe(tapped.forward, seen)

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


@torch.compiler.disable
def _enter(forward: Forward, config: Any, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return forward.enter(config, index, args, kwargs)


@torch.compiler.disable
def _observe(forward: Forward, seen: Attended) -> None:
    forward.observe(seen)
