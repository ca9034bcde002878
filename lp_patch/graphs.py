"""`apply(model, compile=True)`: a prefill without host time, as captured regions.

Two parts of a prefill depend on shapes alone once its plan is made: encoding images (tower, stage 1, projector), and
everything between the first and the last decoder layer. Each is captured as a CUDA graph at its first call of a shape,
hooks and all, and replayed on other inputs of that shape; text is padded on the left to a multiple of `BUCKET`, so that
prompts of about the same length share a capture. On another device a region runs as it is, in the same buffers: right,
and not faster. Whatever does not fit runs as without `compile`, and says so once.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.utils import ModelOutput

from . import cache as kv
from .attention import KEY
from .compat import CACHE, cache_in
from .cut import Cut
from .engine import Engine
from .errors import UnsupportedModelError
from .forward import Forward
from .install import Installation
from .keys import Keys
from .plan import Plan
from .read import Chosen, Encoding
from .regions import Region, Regions
from .registry import Parts
from .settings import Settings
from .trace import Record

BUCKET = 32  # tokens: how finely prompts are told apart by length
DEEP, DEEP_AT = "deepstack_visual_embeds", "visual_pos_masks"  # what the first layers add, and where
_KNOWN = {
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    CACHE,
    "past_key_values",
    "use_cache",
    "cache_position",
    KEY,
    "logits_to_keep",  # of the whole model; some hand it on
    "return_dict",
    DEEP,
    DEEP_AT,
}
_FLAGS = ("output_attentions", "output_hidden_states", "output_router_logits")


class CapturedForward(Forward):
    """A forward inside a region: which keys are padding is a buffer, and nothing about it is asked."""

    def __init__(self, settings: Settings, plan: Plan, cut: Cut, valid: Tensor | None) -> None:
        super().__init__(settings, cut.length, None, None)
        self.plan, self.cuts, self.valid = plan, [cut], valid
        self.record = Record(settings.shape, plan.visual, plan.text, plan.wiped, [])

    def keys_of(self, config: Any, index: int, hidden: Tensor, given: Any = None) -> Keys:
        """What layer `index` attends to: padding stands first in every cut."""
        if len(self.keys) <= index:
            cut = self.cuts[-1]
            if not self.keys or self.keys[-1].length != cut.length:
                mask, valid = None, None
                if self.valid is not None:
                    valid = self.valid[:, : cut.length]
                    causal = torch.ones(cut.length, cut.length, dtype=torch.bool, device=hidden.device).tril()
                    # padding sees itself: a row that sees nothing would be NaN
                    mask = (causal & valid[:, None, None]) | (causal & causal.T)
                self.keys.append(Keys(valid, cut.length, mask))
            else:
                self.keys.append(self.keys[-1])
        return self.keys[index]


class CompiledEngine(Engine):
    """An engine whose prefill runs in captured regions where it can."""

    def __init__(self, parts: Parts, settings: Settings) -> None:
        super().__init__(parts, settings)
        self.encoders, self.languages = Regions(), Regions()

    def install(self, on: Installation) -> None:
        """Put on the model what stays there."""
        module = self.parts.language_model
        if "forward" in vars(module):
            raise UnsupportedModelError(
                f"compile=True takes the place of {type(module).__name__}.forward, where something else already is "
                "(accelerate's device_map with offloading?): leave compile out"
            )
        super().install(on)
        module.forward = self.run
        on.note(partial(delattr, module, "forward"))
        if next(module.parameters()).device.type != "cuda":
            self._warn(
                "compile=True captures CUDA graphs, and this model is on no CUDA device: nothing gets faster here"
            )

    # ------------------------------------------------------------------ encoding images

    def encode(self, encoding: Encoding, wrapped: Callable, args: tuple, kwargs: dict) -> Any:
        """Tower, stage 1 and projector; numbers that say how images are laid out are part of the region's key."""
        given = {name: x for name, x in encoding.arguments.items() if name != "kwargs"}
        pixels = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
        rest = {name: x for name, x in given.items() if name not in pixels}
        if not pixels or torch.is_grad_enabled() or any(rest.get(name) for name in _FLAGS):
            return wrapped(*args, **kwargs)
        shapes = tuple((name, tuple(x.shape), x.dtype, x.device) for name, x in pixels.items())
        facts = tuple((name, repr(x.tolist() if isinstance(x, Tensor) else x)) for name, x in rest.items())
        key = ("encoder", wrapped.__name__, shapes, facts)
        if key in self.state.unfit:
            return wrapped(*args, **kwargs)

        def make() -> Region:
            # the caller may write into his
            own = {name: x.clone() if isinstance(x, Tensor) else x for name, x in rest.items()}

            def run(inputs: dict[str, Tensor]) -> tuple:
                current = self._call().encoding
                assert current is not None
                _forget(current)
                with torch.no_grad():
                    output = wrapped(**own, **inputs)
                return output, list(current.chosen), list(current.present), list(current.towers)

            return Region({name: torch.empty_like(x).copy_(x) for name, x in pixels.items()}, run, modules)

        modules = [x for name, x in self.parts.base.named_children() if x is not self.parts.language_model]
        with self.encoders.lock:
            try:
                region = self.encoders.get(key, make)
                output, chosen, present, towers = region.replay(pixels)
            except RuntimeError as error:
                self.state.unfit.add(key)
                self._say(f"encoding images with {type(self.parts.base).__name__} ({str(error).splitlines()[0]:.120})")
                _forget(encoding)
                return wrapped(*args, **kwargs)
            # copies: the next replay writes the buffers anew
            encoding.chosen = [Chosen(*(None if x is None else x.clone() for x in c)) for c in chosen]
            encoding.present, encoding.towers = present, towers
            return _copied(output)

    # ------------------------------------------------------------------ the decoder layers

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the language model's forward."""
        module = self.parts.language_model
        forward = kwargs.get(KEY)
        if isinstance(forward, Forward) and forward.plan is not None and not args:
            why = self._unfit(forward, kwargs)
            if why is None:
                return self._prefill_region(forward, kwargs)
            self._say(why)
        return type(module).forward(module, *args, **kwargs)

    def _say(self, why: str) -> None:
        self._warn(f"compile=True: {why} is not captured and runs as without it")

    def _unfit(self, forward: Forward, kwargs: dict) -> str | None:
        """Why this prefill cannot be captured, or None."""
        cache, config = cache_in(kwargs), self.parts.language_model.config
        implementation = config._attn_implementation or "sdpa"
        known = {*_KNOWN, *self.parts.adapter.per_token}
        more = [x for x, value in kwargs.items() if x not in known and value is not None and value is not False]
        if forward.finder.tracked or not self.settings.kinds.plain:
            return "a model with windows or with layers without keys"
        if len(forward.cuts[0].where) > 1:
            return "a batch of several rows"
        if torch.is_grad_enabled():
            return "a forward with gradients"
        if forward.past or forward.cuts[0].valid is not None:
            return "a prompt with padding, or on a cache that holds tokens"
        if more or any(getattr(config, x, False) for x in _FLAGS):
            return f"a forward with {', '.join(more) or 'outputs of every layer'}"
        if implementation != "sdpa" and "flash" not in implementation:
            return f"attn_implementation={implementation!r}"
        if forward.gone is not None or self.settings.text_scorer.unrotates:
            return (
                'positions="compact"' if forward.gone is not None else f"text_scorer={self.settings.text_scorer.name!r}"
            )
        dynamic = isinstance(cache, DynamicCache) and all(type(x) is DynamicLayer for x in cache.layers)
        if cache is not None and not dynamic and not kv.is_static(cache):
            return f"a {type(cache).__name__}"
        return None

    def _prefill_region(self, forward: Forward, kwargs: dict) -> Any:
        """All decoder layers, captured or replayed; the forward is left as the layers' hooks would have left it."""
        module, cut, plan = self.parts.language_model, forward.cuts[0], forward.plan
        assert plan is not None
        embeds, ids = kwargs["inputs_embeds"], kwargs["position_ids"]
        bucketed = (module.config._attn_implementation or "sdpa") == "sdpa"
        pad = -cut.length % BUCKET if bucketed else 0
        left = nn.functional.pad
        values = {
            "embeds": left(embeds, (0, 0, pad, 0)),
            "ids": left(ids, (pad, 0)),
            "where": left(cut.where + pad, (pad, 0)),
            "visual": left(cut.visual, (pad, 0)),
        }
        if bucketed:
            values["valid"] = left(torch.ones_like(cut.visual), (pad, 0))
        if forward.weights is not None:
            asked = forward.weights.shape[1]
            values["weights"] = left(forward.weights, (-asked % BUCKET if bucketed else 0, 0))[:, -cut.length - pad :]
        for name in self.parts.adapter.per_token:
            if kwargs.get(name) is not None:
                values[name] = left(kwargs[name], (*(0, 0) * (kwargs[name].dim() - 2), pad, 0))
        if kwargs.get(DEEP_AT) is not None:
            values[DEEP_AT] = left(kwargs[DEEP_AT], (pad, 0))
            values |= {f"{DEEP} {index}": x for index, x in enumerate(kwargs[DEEP])}
        like = tuple((name, tuple(x.shape), x.dtype, x.device) for name, x in values.items())
        key = ("layers", like, plan.survivors[0], plan.stage2[0], plan.wiped[0], module.config._attn_implementation)
        if key in self.state.unfit:
            return type(module).forward(module, **kwargs)

        def run(inputs: dict[str, Tensor]) -> tuple[Any, CapturedForward, Any]:
            return self._layers(inputs, plan)

        with self.languages.lock:
            try:
                buffers = {name: x.clone() for name, x in values.items()}
                region = self.languages.get(key, lambda: Region(buffers, run, [module]))
                output, captured, stored = region.replay(values)
            except RuntimeError as error:
                self.state.unfit.add(key)  # a capture that fails is not tried in every call
                self._say(f"{type(module).__name__} ({str(error).splitlines()[0]:.120})")
                return type(module).forward(module, **kwargs)
            cache, use = cache_in(kwargs), kwargs.get("use_cache")
            if cache is None and (module.config.use_cache if use is None else use):
                cache = DynamicCache(config=module.config)
            return self._adopt(forward, captured, output, stored, pad, cache)

    def _layers(self, inputs: dict[str, Tensor], plan: Plan) -> tuple[Any, CapturedForward, Any]:
        """What a region runs: the language model's own forward, whose layers' hooks are on."""
        module = self.parts.language_model
        where = inputs["where"]
        length = where.shape[1]
        cut = Cut(0, length, where, where, None, inputs["visual"])
        # padding counts as text: it is never cut, and only masks know it
        forward = CapturedForward(self.settings, replace(plan, kept=[length]), cut, inputs.get("valid"))
        forward.weights = inputs.get("weights")
        if self.parts.true_positions:
            forward.true_ids = inputs["ids"]
        cache: Any = DynamicCache()
        keys = forward.keys_of(module.config, 0, inputs["embeds"])
        given = {"inputs_embeds": inputs["embeds"], "attention_mask": keys.mask, "position_ids": inputs["ids"]}
        given |= {name: inputs[name] for name in (DEEP_AT, *self.parts.adapter.per_token) if name in inputs}
        if DEEP_AT in inputs:
            given[DEEP] = [x for name, x in inputs.items() if name.startswith(DEEP)]
        output = type(module).forward(module, **given, **{CACHE: cache, "use_cache": True, KEY: forward})
        return output, forward, cache

    def _adopt(
        self, forward: Forward, captured: CapturedForward, output: Any, stored: Any, pad: int, cache: Any
    ) -> Any:
        """Copies of what a region left, for the forward, its record and its cache; padding stays behind."""
        assert forward.record is not None and captured.record is not None
        for cut in captured.cuts[1:]:
            where = cut.where[:, pad:] - pad
            forward.cuts.append(Cut(cut.start, where.shape[1], where, where, None, cut.visual[:, pad:].clone()))
        if captured.record.stage2 is not None:
            _, chosen, scores = captured.record.stage2
            forward.record.note_stage2(forward.cuts[0].where, chosen[:, pad:].clone(), scores[:, pad:].clone())
        shared = {keys.length: Keys(None, keys.length - pad, None) for keys in captured.keys}
        forward.keys = [shared[keys.length] for keys in captured.keys]
        if cache is not None:
            self._fill(forward, cache, [(x.keys[:, :, pad:], x.values[:, :, pad:]) for x in stored.layers])
        # `outputs.finish` copies the hidden states; a cache that nobody asked for stays behind
        shown = {"last_hidden_state": output.last_hidden_state[:, pad:], CACHE: cache}
        return type(output)(**shown)

    def _fill(self, forward: Forward, cache: Cache, stored: list[tuple[Tensor, Tensor]]) -> None:
        """Put copies of keys and values (B, KV, N, D) of each layer into an empty cache."""
        if kv.is_static(cache):
            told: dict[int, kv.Slots] = {}
            for index, (keys, values) in enumerate(stored):
                cut = forward.cut_of(index)
                assert cut is not None and forward.plan is not None
                told[cut.start] = kv.prepare_slots(
                    cache, index, cut.where, None, 0, forward.new, forward.plan.tail, told.get(cut.start)
                )
                layer: Any = cache.layers[index]
                layer.update(keys, values)
            return
        copies = [(torch.empty_like(x), torch.empty_like(y)) for x, y in stored]
        torch._foreach_copy_([x for pair in copies for x in pair], [x for pair in stored for x in pair])
        for index, (keys, values) in enumerate(copies):
            if index >= len(cache.layers):
                cache.layers.append(DynamicLayer())
            own: Any = cache.layers[index]
            own.lazy_initialization(keys, values)
            own.keys, own.values = keys, values


def _forget(encoding: Encoding) -> None:
    """What an earlier run on the same images noted."""
    encoding.chosen, encoding.present, encoding.towers = [], [], []
    encoding.attention, encoding.rows = {}, None


def _copied(output: Any) -> Any:
    """What an encoder returned, in memory of its own, but for the states of all its layers."""
    if isinstance(output, ModelOutput):
        shown = {name: x for name, x in vars(output).items() if name not in ("hidden_states", "attentions")}
        return type(output)(**{name: _copied(x) for name, x in shown.items()})
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, (list, tuple)):
        return type(output)([_copied(x) for x in output])
    return output
