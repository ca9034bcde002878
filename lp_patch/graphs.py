"""`apply(model, compile=True)`: a prefill without host time, as captured regions.

Two parts of a prefill depend on shapes alone once its plan is made: encoding images (tower, stage 1, projector), and
everything between the first and the last decoder layer. Each is captured as a CUDA graph at its first call of a shape,
lp_patch's hooks and all, and replayed on other inputs of that shape; text is padded on the left to a multiple of
`BUCKET`, so that prompts of about the same length share a capture. Whatever does not fit runs as without `compile`, and
says so once; on another device everything does.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import ModelOutput

from .attention import KEY
from .captured import (
    BUCKET,
    FLAGS,
    CapturedForward,
    adopt,
    is_bucketed,
    leaves_no_state,
    mask_names,
    run_layers,
    values_of,
    why_not,
)
from .compat import cache_in
from .engine import Engine
from .errors import UnsupportedModelError
from .forward import Forward
from .install import Installation
from .read import Chosen, Encoding
from .regions import NotNow, Region, Regions
from .registry import RECURRENT, Parts
from .settings import Settings


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
        devices = sorted({str(x.device) for x in self.parts.base.parameters()})
        if len(devices) > 1:
            raise UnsupportedModelError(
                f"compile=True captures what runs on one device, this model lies on {', '.join(devices)}: leave it out"
            )
        super().install(on)
        module.forward = partial(self.run, module)
        on.note(partial(self._uninstall, module, module.forward))
        if self._device.type != "cuda":
            self._warn(
                "compile=True captures CUDA graphs, and this model is on no CUDA device: nothing gets faster here"
            )

    def _uninstall(self, module: Any, forward: Callable) -> None:
        if vars(module).get("forward") is forward:  # else somebody has put his own there since
            del module.forward
        self.encoders.clear()
        self.languages.clear()

    @property
    def _device(self) -> torch.device:
        return next(self.parts.language_model.parameters()).device

    # ------------------------------------------------------------------ encoding images

    def encode(self, encoding: Encoding, wrapped: Callable, args: tuple, kwargs: dict) -> Any:
        """Tower, stage 1 and projector; numbers that say how images are laid out are part of the region's key."""
        given = {name: x for name, x in encoding.arguments.items() if name != "kwargs"}
        pixels = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
        rest = {name: x for name, x in given.items() if name not in pixels}
        unfit = not pixels or torch.is_grad_enabled() or any(rest.get(name) for name in FLAGS)
        if unfit or self._device.type != "cuda":
            return wrapped(*args, **kwargs)
        leaves, form = tree_flatten(rest)
        why = None
        if any(isinstance(x, Tensor) and x.is_floating_point() for x in leaves):
            why = "in a list"
        elif torch.is_autocast_enabled("cuda"):
            why = "under autocast"
        elif self.parts.adapter.blanks and any(map(_has_blank, pixels.values())):
            why = "of which some are blank"
        if why is not None:
            self._say(f"encoding images {why}")
            return wrapped(*args, **kwargs)
        shapes = tuple((name, tuple(x.shape), x.dtype, x.device) for name, x in pixels.items())
        key = (wrapped.__name__, shapes, self._implementations(), repr(form), *map(_fact, leaves))

        def make() -> Region:
            # the caller may write into his
            with torch.inference_mode(False):
                own = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, rest)

            def run(inputs: dict[str, Tensor]) -> tuple:
                current = self._call().encoding
                assert current is not None
                _forget(current)
                output = wrapped(**own, **inputs)
                return output, list(current.chosen), current.rows, list(current.present), list(current.towers)

            return Region(pixels, run, self._vision_side(), self._configs(), blank=not self.parts.adapter.blanks)

        with self.encoders.turn(self._device):
            what = f"encoding images with {type(self.parts.base).__name__}"
            found = self._replayed(self.encoders, key, make, pixels, what)
            if found is not None:
                output, chosen, rows, encoding.present, encoding.towers = found
                # copies: the next replay writes the buffers anew
                encoding.chosen = [Chosen(*(None if x is None else x.clone() for x in c)) for c in chosen]
                encoding.rows = None if rows is None else rows.clone()
                return _copied(output)
        _forget(encoding)
        return wrapped(*args, **kwargs)

    def _vision_side(self) -> list[nn.Module]:
        """All modules that take part in encoding images."""
        base = self.parts.base
        roots = [x for x in base.children() if x is not self.parts.language_model]
        roots += [] if self.settings.pruner is None else [self.settings.pruner]
        return [base, *(x for root in roots for x in root.modules())]

    def _configs(self) -> list[Any]:
        """The model's config and those of its parts."""
        config: Any = self.parts.base.config
        return [config, *(x for name in config.sub_configs if (x := getattr(config, name, None)) is not None)]

    def _implementations(self) -> tuple:
        """How the parts of the model compute attention and experts, which may be set at any time."""
        kinds = ("attn", "experts")
        return tuple(getattr(x, f"_{kind}_implementation", None) for x in self._configs() for kind in kinds)

    # ------------------------------------------------------------------ the decoder layers

    def run(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """In the place of the forward of the language model, or of a copy of it alone, which has its own weights."""
        forward, here = kwargs.get(KEY), module is self.parts.language_model and self._device.type == "cuda"
        if here and isinstance(forward, Forward) and forward.plan is not None and not args:
            cache = cache_in(kwargs)
            if cache is None:
                cache = DynamicCache(config=module.config)  # as the model makes one
            why = why_not(self.parts, self.settings, forward, kwargs, cache)
            if why is None:
                return self._prefill_region(forward, kwargs, cache)
            self._say(why)
        return type(module).forward(module, *args, **kwargs)

    def _say(self, what: str) -> None:
        self._warn(f"compile=True: {what} is not captured and runs as without it")

    @torch.compiler.disable
    def _prefill_region(self, forward: Forward, kwargs: dict, cache: Cache) -> Any:
        """All decoder layers, captured or replayed; the forward is left as the layers' hooks would have left it."""
        module, parts, settings, plan = self.parts.language_model, self.parts, self.settings, forward.plan
        assert plan is not None
        pad = -forward.cuts[0].length % BUCKET if is_bucketed(parts) else 0
        values, masks = values_of(parts, forward, kwargs, pad), mask_names(forward, kwargs)
        like = tuple((name, tuple(x.shape), x.dtype, x.device) for name, x in values.items())
        counts = plan.survivors[0], plan.stage2[0], plan.wiped[0]
        key = (like, masks, counts, self._implementations())

        def run(inputs: dict[str, Tensor]) -> tuple[Any, CapturedForward, Cache]:
            return run_layers(parts, settings, plan, inputs, masks)

        def make() -> Region:
            if pad and RECURRENT in settings.kinds.names and not leaves_no_state(parts, settings, plan, values, masks):
                raise RuntimeError("padding, with which prompts share a capture, changes the state of its layers")
            return Region(values, run, list(module.modules()), self._configs())

        with self.languages.turn(self._device):
            found = self._replayed(self.languages, key, make, values, type(module).__name__)
            if found is not None:
                output, captured, stored = found
                use = kwargs.get("use_cache")
                wanted = cache_in(kwargs) is not None or (module.config.use_cache if use is None else use)
                return adopt(forward, captured, output, stored, pad, cache if wanted else None)
        return type(module).forward(module, **kwargs)

    def _replayed(
        self, regions: Regions, key: tuple, make: Callable[[], Region], values: dict[str, Tensor], what: str
    ) -> Any:
        """What a region gives for these values; None where there is none, or none can be captured."""
        try:
            region = regions.get(key, make)
            return None if region is None else region.replay(values)
        except Exception as error:  # of any kind: if it is not about the capture, it comes again without one
            if not isinstance(error, NotNow):
                regions.refuse(key)
            said = (str(error) or type(error).__name__).splitlines()[0]
            self._say(f"{what} ({said:.120})")
            return None


def _fact(x: Any) -> Any:
    """What a region's key says of an argument."""
    return (tuple(x.shape), x.dtype, x.cpu().numpy().tobytes()) if isinstance(x, Tensor) else repr(x)


def _has_blank(pixels: Tensor) -> bool:
    """Whether an image of (B, N, ...) is all zeros."""
    return bool((pixels.flatten(2) == 0).all(dim=2).any())


def _forget(encoding: Encoding) -> None:
    """What an earlier run on the same images noted."""
    encoding.chosen, encoding.present, encoding.towers = [], [], []
    encoding.attention, encoding.rows = {}, None


def _copied(output: Any) -> Any:
    """What an encoder returned, in memory of its own, but for the states of all its layers."""
    if isinstance(output, ModelOutput):
        own = {name: _copied(x) for name, x in vars(output).items() if name not in ("hidden_states", "attentions")}
        kind: Any = type(output)
        declared = {x.name for x in fields(kind)}  # before 5.23 some are set beside those
        copy = kind(**{name: x for name, x in own.items() if name in declared})
        for name in own.keys() - declared:
            setattr(copy, name, own[name])
        return copy
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, (list, tuple)):
        return type(output)([_copied(x) for x in output])
    return output
