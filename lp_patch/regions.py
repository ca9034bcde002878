"""Computations at fixed shapes: captured as CUDA graphs once, replayed on what is put into their buffers."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .engine import Engine
from .host import HostValues
from .install import owner

MOST = 8  # regions of each kind that are kept; the one unused for longest goes


class Region:
    """One computation at fixed shapes, in fixed buffers.

    Args:
        modules: whose weights it computes with.
        blank: whether it is to hold for zeros, too.

    Attributes:
        inputs: its buffers, by name.
        result: what `run` returned; its tensors are written anew by each replay.
        bytes: device memory that the capture holds.
        used: the call in which it was used last, as `Regions` counts them.
    """

    def __init__(
        self,
        inputs: dict[str, Tensor],
        run: Callable[[dict[str, Tensor]], Any],
        modules: list[nn.Module],
        blank: bool = True,
    ) -> None:
        self.inputs, self._run = inputs, run
        self._print = Fingerprint(modules)
        self._graph: Any = None
        self.bytes = self.used = 0
        self._host = HostValues()
        device = next(iter(inputs.values())).device
        if device.type != "cuda":
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(stream):
            self._learn(blank)  # kernels are chosen and compiled outside the capture, too
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

    def _learn(self, blank: bool) -> None:
        """Note what the host and the device tell each other, and that it does not depend on what is in the buffers."""
        self._run(self.inputs)  # whatever is made once and kept is there
        with self._host.learning():
            self._run(self.inputs)
        kept = {name: x.clone() for name, x in self.inputs.items()}
        for fill in (_noise, _nothing) if blank else (_noise,):
            for name, x in self.inputs.items():
                fill(x, kept[name])
            other = HostValues()
            with other.learning():
                self._run(self.inputs)
            if not self._host.same(other):
                raise RuntimeError("what it asks of the device depends on its inputs")
        for name, x in kept.items():
            self.inputs[name].copy_(x)

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


def _noise(buffer: Tensor, was: Tensor) -> None:
    """Other numbers that a buffer may hold: masks and positions have theirs elsewhere."""
    if buffer.is_floating_point():
        buffer.normal_()
    else:
        buffer.copy_(was.roll(1, -1))


def _nothing(buffer: Tensor, was: Tensor) -> None:
    """Zeros, which some models take for images that are not there."""
    if buffer.is_floating_point():
        buffer.zero_()
    else:
        buffer.copy_(was)


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
    """The captured regions of one kind, the latest used last.

    A capture takes as long as several calls. Once `MOST` are kept, another shape takes the place of the one unused for
    longest only where it has come twice since that was used: prompts that never come again capture nothing.
    """

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple, Region] = OrderedDict()
        self.lock = threading.RLock()  # buffers are shared: one replay at a time
        self._refused: set[tuple] = set()
        self._now = 0
        self._passed: OrderedDict[tuple, int] = OrderedDict()  # when shapes came that were not captured

    def get(self, key: tuple, make: Callable[[], Region]) -> Region | None:
        """The region of this key, captured if there is none that still holds; None where that does not pay."""
        self._now += 1
        if key not in self.kept and not self._admits(key):
            return None
        region = self.kept.pop(key, None)
        if region is None or region.stale:
            region = None  # free it before another takes memory
            if len(self.kept) == MOST:
                self.kept.popitem(last=False)
            region = make()
        self.kept[key], region.used = region, self._now
        return region

    def _admits(self, key: tuple) -> bool:
        if key in self._refused or len(self._refused) == MOST:  # so many shapes failed: this model's will
            return False
        if len(self.kept) < MOST:
            return True
        before = self._passed.pop(key, 0)
        if before > next(iter(self.kept.values())).used:
            return True
        self._passed[key] = self._now
        if len(self._passed) > 8 * MOST:
            self._passed.popitem(last=False)
        return False

    def refuse(self, key: tuple) -> None:
        """A capture that failed is not tried in every call."""
        self.kept.pop(key, None)
        self._refused.add(key)

    def __deepcopy__(self, memo: dict) -> "Regions":
        return Regions()

    def __reduce__(self) -> tuple:
        return Regions, ()
