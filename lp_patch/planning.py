"""What a prefill will do, found out while the device still encodes its images."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from . import cache as kv
from .compat import PREFILL_METHODS, cache_in
from .early import EarlyStage
from .errors import UnsupportedInputError
from .install import Installation
from .plan import Planned, find_inputs, find_places, make_plan, query_weights
from .prefill import facts_of
from .prompt import make_prompt, read_host
from .read import Call, PerThread, State, shows_images
from .refuse import flat_mask, refuse_chunks
from .trace import Record


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


class Planner(EarlyStage):
    """The hooks that read a prompt and plan for it, as early as both can be done."""

    state: EngineState

    def install(self, on: Installation) -> None:
        """Put the hooks on the model."""
        super().install(on)
        for name in PREFILL_METHODS:
            if hasattr(self.parts.model, name):
                on.wrap(self.parts.model, name, self.around_prefill)

    @torch.compiler.disable
    def around_prefill(self, wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps the prefill of generate(): whether it cuts the prompt into chunks."""
        given = [*args, *kwargs.values()]
        chunk = next((x.prefill_chunk_size for x in given if isinstance(x, GenerationConfig)), None)
        named = [kwargs, *(x for x in given if isinstance(x, dict))]
        raw = any(name.startswith("pixel_values") and x[name] is not None for x in named for name in x)
        if raw and self.settings.config.ratio != 1:
            refuse_chunks(chunk)  # raw pictures are lost between chunks, silently before 5.24
        self.state.local.chunk = chunk
        try:
            return wrapped(*args, **kwargs)
        finally:
            self.state.local.chunk = None

    def before_base(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward starts. Where token ids tell all, they are read now: later the device is busy with the images."""
        super().before_base(module, args, kwargs)
        call, adapter = self.state.local.call, self.parts.adapter
        if call is not None and call.shows and call.ids is not None and adapter.structural is None is adapter.merge:
            call.expected = sum(shows_images(name, kwargs[name]) for name in kwargs)
            call.read_mask = call.given
            call.host = self._read(call, None, call.ids.shape, kwargs)
            self.encoded(call)

    def _read(self, call: Call, embeds: Tensor | None, shape: tuple[int, ...], kwargs: dict) -> Any:
        """The caller's mask as (B, seen + S), and what the host must know of the prompt."""
        cache, length = cache_in(kwargs), shape[1]
        flat = flat_mask(kwargs.get("attention_mask"), cache, length)
        seen = kv.seen_tokens(cache) if isinstance(cache, kv.Cache) else 0
        asking = self.asking_of(call.generated, shape[0], length, seen)
        mask = None if flat is None else flat[:, -length:]
        return flat, asking is not None, read_host(self, call, embeds, mask, asking, kwargs)

    def encoded(self, call: Call) -> None:
        """All images of a call may be encoded, and the device busy with them: plan meanwhile."""
        if call.host is not None and len(call.features) == call.expected:
            try:
                call.planned = self._plan(call)
            except UnsupportedInputError:  # perhaps of a forward that failed before: this one's will ask again
                call.planned = None

    def _plan(self, call: Call) -> Planned:
        flat, named, host = call.host
        prompt = make_prompt(self, call, host)
        facts = [[facts_of(x) for x in call.features[m.name]] for m in prompt.modalities]
        adapter, settings = self.parts.adapter, self.settings
        try:
            inputs = find_inputs(prompt, facts, adapter.merge_adjacent, settings.budget, adapter.split)
        except UnsupportedInputError:
            refuse_chunks(self.state.local.chunk)  # what a chunk holds need not be whole images
            raise
        plan = make_plan(inputs, prompt, settings.shape.wipe_layer is not None)
        places = weights = None
        if not plan.nothing:
            places = find_places(plan, prompt)
            weights = query_weights(settings.text_scorer.weigh, plan, prompt, named) if plan.cuts else None
        return Planned(flat, prompt, plan, places, weights)
