"""Computations at fixed shapes: captured as CUDA graphs once, replayed on what is put into their buffers."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registered

from .engine import Engine
from .host import HostValues
from .install import owner

MOST = 8  # regions of each kind that are kept; the one unused for longest goes
_capturing = threading.RLock()  # torch captures one graph at a time


class NotNow(RuntimeError):
    """This call cannot be captured; another of its shape may be."""


class Region:
    """One computation at fixed shapes, in fixed buffers.

    Args:
        values: what fills its buffers first, by name.
        modules: those that take part in it; `configs`, those that they may read.
        blank: whether it is to hold for zeros, too.

    Attributes:
        result: what `run` returned; its tensors are written anew by each replay.
        bytes: device memory that the capture holds.
        used: the call in which it was used last, as `Regions` counts them.
    """

    def __init__(
        self,
        values: dict[str, Tensor],
        run: Callable[[dict[str, Tensor]], Any],
        modules: list[nn.Module],
        configs: list[Any],
        blank: bool = True,
    ) -> None:
        if _hooked(modules):
            raise NotNow("hooks of others, which a replay would not call")
        self._run, self._host, self.used = run, HostValues(), 0
        device = next(iter(values.values())).device
        # buffers that inference mode made could not be filled outside it
        with _capturing, torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            self._inputs = {name: torch.empty_like(x).copy_(x) for name, x in values.items()}
            self._capture(device, modules, configs, blank)

    def _capture(self, device: torch.device, modules: list[nn.Module], configs: list[Any], blank: bool) -> None:
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        mode = torch.cuda.get_sync_debug_mode()
        try:
            with torch.cuda.stream(stream):
                self._learn(blank)  # kernels are chosen and compiled outside the capture, too
                self._print = Fingerprint(
                    modules, configs
                )  # after a run, at the first of which transformers adds hooks
                torch.cuda.set_sync_debug_mode("error")  # a wait cannot be captured: found out before it breaks one
                self._once()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(stream)
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        torch._C._cuda_clearCublasWorkspaces()  # the graph's lies in its own memory, and nobody else's does
        try:
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self.result = self._once()
        except BaseException:
            torch.cuda.set_stream(current)  # which a capture that cannot be ended does not go back to
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        pool = tuple(self._graph.pool())
        segments = torch.cuda.memory_snapshot()
        self.bytes = sum(x["total_size"] for x in segments if tuple(x.get("segment_pool_id", ())) == pool)

    def _learn(self, blank: bool) -> None:
        """Note what the host and the device tell each other, and that it does not depend on what is in the buffers."""
        self._run(self._inputs)  # whatever is made once and kept is there
        with self._host.learning():
            self._run(self._inputs)
        kept = {name: x.clone() for name, x in self._inputs.items()}
        for fill in (_noise, torch.zeros_like) if blank else (_noise,):
            for name, x in self._inputs.items():
                x.copy_(fill(x) if x.is_floating_point() else kept[name].roll(1, -1))
            other = HostValues()
            with other.learning():
                self._run(self._inputs)
            if not self._host.same(other):
                raise RuntimeError("what it asks of the device depends on its inputs")
        for name, x in kept.items():
            self._inputs[name].copy_(x)

    def _once(self) -> Any:
        with self._host.replaying():
            return self._run(self._inputs)

    @property
    def stale(self) -> bool:
        """Whether a weight or a module is not what was captured, or others have put hooks on."""
        return self._print.changed()

    def replay(self, values: dict[str, Tensor]) -> Any:
        """The computation on these values, which fill the buffers."""
        for name, value in values.items():
            self._inputs[name].copy_(value, non_blocking=True)
        self._graph.replay()
        return self.result


def _noise(x: Tensor) -> Tensor:
    """Numbers without an order, of which no generator knows."""
    return (torch.arange(x.numel(), device=x.device) * 12.9898).sin().view_as(x).to(x.dtype)


def _hooked(modules: list[nn.Module]) -> bool:
    """Whether somebody else's hooks are called in a forward of these: transformers' own only collect outputs."""
    if registered._global_forward_hooks or registered._global_forward_pre_hooks:
        return True
    # lists: another thread's forward may put its own on meanwhile
    hooks = [hook for x in modules if x._forward_hooks for hook in list(x._forward_hooks.values())]
    hooks += [hook for x in modules if x._forward_pre_hooks for hook in list(x._forward_pre_hooks.values())]
    return any(
        not isinstance(owner(hook), Engine)
        and not getattr(getattr(hook, "func", hook), "__module__", "").startswith("transformers.")
        for hook in hooks
    )


class Fingerprint:
    """What a capture depends on: which modules there are and how they are set, and where their weights lie.

    Args:
        modules: that take part.
        configs: which they may read.
    """

    def __init__(self, modules: list[nn.Module], configs: list[Any]) -> None:
        self._modules = modules
        self._children = [(x._modules, list(x._modules.values())) for x in modules if x._modules]
        owners = [own for x in modules for own in (x._parameters, x._buffers) if own]
        self._tensors = [(own, _places(own)) for own in owners]
        self._forwards = [(x, type(x).forward, vars(x).get("forward")) for x in modules]
        self._settings = [_settings(vars(x)) for x in (*modules, *configs)]

    def changed(self) -> bool:
        """Whether any of it is not as it was."""
        return (
            any(list(own.values()) != before for own, before in self._children)
            or any(_places(own) != before for own, before in self._tensors)
            or any(
                x.__class__.forward is not forward or x.__dict__.get("forward") is not own
                for x, forward, own in self._forwards
            )
            or any(len(own) != size or get(own) != before for own, size, get, before in self._settings)
            or _hooked(self._modules)
        )


_EVERYWHERE = vars(nn.Module()).keys() - {"training"}  # torch's own bookkeeping


def _settings(own: dict[str, Any]) -> tuple:
    """What an object is set to, where it lies, how much lies there, and how to look again.

    What is new there counts: PEFT switches an adapter off by an attribute that hides its class's.
    """
    get = itemgetter(*(name for name, x in own.items() if _is_plain(x) and name not in _EVERYWHERE))
    return own, len(own), get, deepcopy(get(own))


def _is_plain(x: Any) -> bool:
    """Whether x is a setting: a number, a name, or a few of those. None is what a call may leave something in."""
    if isinstance(x, (list, tuple)):
        return all(map(_is_plain, x))
    if isinstance(x, dict):
        return all(map(_is_plain, x.values()))
    return isinstance(x, (bool, int, float, str))


def _places(tensors: Any) -> list[Any]:
    return [x if x is None else (x.data_ptr(), x.numel()) for x in tensors.values()]


class Regions:
    """The captured regions of one kind, the latest used last.

    A capture takes as long as several calls. Once `MOST` are kept, another shape takes the place of the one unused for
    longest only where it has come twice since that was used: prompts that never come again capture nothing.
    """

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple, Region] = OrderedDict()
        self._lock = threading.RLock()
        self._free: Any = None
        self._refused: set[tuple] = set()
        self._now = 0
        self._passed: OrderedDict[tuple, int] = OrderedDict()  # when shapes came that were not captured

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """Buffers and results are shared: one call at a time, also of threads with streams of their own."""
        with self._lock:
            stream = torch.cuda.current_stream(device)
            if self._free is not None:
                stream.wait_event(self._free)
            try:
                yield
            finally:
                self._free = stream.record_event()

    def get(self, key: tuple, make: Callable[[], Region]) -> Region | None:
        """The region of this key, captured if there is none that still holds; None where that does not pay."""
        self._now += 1
        if key not in self.kept and not self._admits(key):
            return None
        region = self.kept.pop(key, None)
        if region is None or region.stale:
            region = None  # free it before another takes memory
            region = make()
        self.kept[key], region.used = region, self._now
        if len(self.kept) > MOST:
            self.kept.popitem(last=False)
        return region

    def _admits(self, key: tuple) -> bool:
        if key in self._refused or len(self._refused) >= MOST:  # so many shapes failed: this model's will
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

    def clear(self) -> None:
        """Free the memory of all."""
        self.kept.clear()

    def refuse(self, key: tuple) -> None:
        """A capture that failed is not tried in every call."""
        self.kept.pop(key, None)
        self._refused.add(key)

    def __deepcopy__(self, memo: dict) -> "Regions":
        return Regions()

    def __reduce__(self) -> tuple:
        return Regions, ()
