"""`apply(model, compile=True)`: a prefill without host time, as captured regions.

Two parts of a prefill depend on shapes alone once its plan is made: encoding images (tower, stage 1, projector), and
everything between the first and the last decoder layer. Each is captured as a CUDA graph at its first call of a shape,
hooks and all, and replayed on other inputs of that shape; text is padded on the left to a multiple of `BUCKET`, so that
prompts of about the same length share a capture. On another device a region runs as it is, in the same buffers: right,
and not faster. Whatever does not fit runs as without `compile`, and says so once.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from . import cache as kv
from .attention import KEY
from .compat import CACHE, cache_in
from .cut import Cut
from .engine import Engine
from .errors import UnsupportedModelError
from .forward import Forward
from .install import Installation, owner
from .keys import Keys
from .plan import Plan
from .read import Chosen, Encoding
from .registry import Parts
from .settings import Settings
from .trace import Record

BUCKET = 32  # tokens: how finely prompts are told apart by length
MOST = 8  # regions of each kind that are kept; the one unused for longest goes
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
}
_FLAGS = ("output_attentions", "output_hidden_states", "output_router_logits")


class Region:
    """One computation at fixed shapes, in fixed buffers.

    Attributes:
        inputs: its buffers, by name.
        result: what `run` returned; its tensors are written anew by each replay.
        bytes: device memory that the capture holds.
    """

    def __init__(self, inputs: dict[str, Tensor], run: Callable[[dict[str, Tensor]], Any], modules: list[nn.Module]):
        self.inputs, self._run = inputs, run
        self._print = Fingerprint(modules)
        self._graph: Any = None
        self.bytes = 0
        self._host = HostValues()
        device = next(iter(inputs.values())).device
        if device.type != "cuda":
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(stream):
            self._learn()  # kernels are chosen and compiled outside the capture, too
            torch.cuda.set_sync_debug_mode("error")  # a wait cannot be captured: found out before it breaks one
            try:
                self._once()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.result = self._once()
        self._graph = graph
        pool = tuple(graph.pool())
        segments = torch.cuda.memory_snapshot()
        self.bytes = sum(x["total_size"] for x in segments if tuple(x.get("segment_pool_id", ())) == pool)

    def _learn(self) -> None:
        """Note what the host and the device tell each other, and that it does not depend on what is in the buffers."""
        self._run(self.inputs)  # whatever is made once and kept is there
        with self._host.learning():
            self._run(self.inputs)
        kept = {name: x.clone() for name, x in self.inputs.items() if x.is_floating_point()}
        other = HostValues()
        for name in kept:
            self.inputs[name].normal_()
        with other.learning():
            self._run(self.inputs)
        for name, x in kept.items():
            self.inputs[name].copy_(x)
        if not self._host.same(other):
            raise RuntimeError("what it asks of the device depends on the images")

    def _once(self) -> Any:
        with self._host.replaying():
            return self._run(self.inputs)

    @property
    def stale(self) -> bool:
        """Whether a weight has moved, or a module or a hook came or went, since the capture."""
        return self._print.changed()

    def replay(self, values: dict[str, Tensor]) -> Any:
        """The computation on these values, which fill the buffers."""
        for name, value in values.items():
            self.inputs[name].copy_(value, non_blocking=True)
        if self._graph is None:
            self.result = self._run(self.inputs)
        else:
            self._graph.replay()
        return self.result


class HostValues(TorchFunctionMode):
    """What passes between host and device while a region runs, which a graph cannot do: learnt once, then known.

    Small tensors that a model makes on the host (bounds, sizes), and numbers of them that it asks back. All of it comes
    from what is part of a region's key; whatever else is asked would differ for other inputs, and is found out so.
    """

    _ASKED = (Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__)
    _MADE = (torch.tensor, torch.as_tensor, Tensor.to, Tensor.cuda)

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Any] = []
        self._next: int | None = None

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Note everything, in order."""
        self.values, self._next = [], None
        with self:
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Give everything again, in the same order."""
        self._next = 0
        with self:
            yield

    def same(self, other: "HostValues") -> bool:
        """Whether another run passed the same."""
        pairs = zip(self.values, other.values, strict=False)
        return len(self.values) == len(other.values) and all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs
        )

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        on_device = isinstance(first, Tensor) and first.device.type != "cpu"
        if (func in self._ASKED and on_device) or (func in self._MADE and not on_device):
            passes = func in self._ASKED or self._goes_over(args, kwargs)
            if self._next is None:
                value = func(*args, **kwargs)
                if isinstance(value, Tensor) and passes != (value.device.type != "cpu"):
                    raise RuntimeError(f"it moves a tensor in a way that is not understood: {func.__name__}")
                if passes:
                    self.values.append(value.clone() if isinstance(value, Tensor) else value)
                return value
            if passes:
                value = self.values[self._next]
                self._next += 1
                # a copy: the region may write into it
                return value.clone() if isinstance(value, Tensor) else value
        return func(*args, **kwargs)

    @staticmethod
    def _goes_over(args: tuple, kwargs: dict) -> bool:
        """Whether a call that makes a tensor, or moves one, names another device than the CPU."""
        named = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, (torch.device, str, Tensor))]
        return any((x.device if isinstance(x, Tensor) else torch.device(x)).type != "cpu" for x in named)


class Fingerprint:
    """What a capture depends on: which modules there are, where their weights lie, which hooks of others they carry."""

    def __init__(self, roots: list[nn.Module]) -> None:
        modules = [module for root in roots for module in root.modules()]
        self._children = [(x._modules, list(x._modules.values())) for x in modules if x._modules]
        weights = [(x._parameters, name) for x in modules for name, own in x._parameters.items() if own is not None]
        self._weights = [(own, name, _address(own[name])) for own, name in weights]
        self._hooks = [x for module in modules for x in (module._forward_pre_hooks, module._forward_hooks)]
        self._others = self._foreign()

    def _foreign(self) -> list[int]:
        return [
            id(hook) for hooks in self._hooks if hooks for hook in hooks.values() if not isinstance(owner(hook), Engine)
        ]

    def changed(self) -> bool:
        """Whether any of it is not as it was."""
        return (
            any(list(own.values()) != before for own, before in self._children)
            or any(_address(own.get(name)) != at for own, name, at in self._weights)
            or self._foreign() != self._others
        )


def _address(weight: Tensor | None) -> int:
    return 0 if weight is None else weight.data_ptr()


class Regions:
    """The captured regions of one kind, the latest used last."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple, Region] = OrderedDict()
        self.lock = threading.RLock()  # buffers are shared: one replay at a time

    def get(self, key: tuple, make: Callable[[], Region]) -> Region:
        """The region of this key, captured if there is none that still holds."""
        region = self.kept.pop(key, None)
        if region is None or region.stale:
            region = None  # free it before another takes memory
            region = make()
        self.kept[key] = region
        while len(self.kept) > MOST:
            self.kept.popitem(last=False)
        return region

    def __deepcopy__(self, memo: dict) -> "Regions":
        return Regions()

    def __reduce__(self) -> tuple:
        return Regions, ()


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
        rest = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in given.items() if name not in pixels}
        if not pixels or torch.is_grad_enabled() or rest.get("output_attentions"):
            return wrapped(*args, **kwargs)
        shapes = tuple((name, tuple(x.shape), x.dtype, x.device) for name, x in pixels.items())
        facts = tuple((name, repr(x.tolist() if isinstance(x, Tensor) else x)) for name, x in rest.items())
        key = ("encoder", wrapped.__name__, shapes, facts)
        if key in self.state.unfit:
            return wrapped(*args, **kwargs)

        def run(inputs: dict[str, Tensor]) -> tuple:
            current = self._call().encoding
            assert current is not None
            _forget(current)
            with torch.no_grad():
                output = wrapped(**rest, **inputs)
            return output, list(current.chosen), list(current.present), list(current.towers)

        modules = [x for name, x in self.parts.base.named_children() if x is not self.parts.language_model]
        with self.encoders.lock:
            try:
                buffers = {name: torch.empty_like(x).copy_(x) for name, x in pixels.items()}
                region = self.encoders.get(key, lambda: Region(buffers, run, modules))
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
        more = [x for x, value in kwargs.items() if x not in _KNOWN and value is not None and value is not False]
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
    """What an encoder returned, in memory of its own: the features that a model reads, nothing else."""
    if isinstance(output, BaseModelOutputWithPooling):
        read = ("pooler_output", "deepstack_features")
        return type(output)(**{name: _copied(getattr(output, name)) for name in read if hasattr(output, name)})
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, (list, tuple)):
        return type(output)([_copied(x) for x in output])
    return output
