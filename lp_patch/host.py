"""What passes between host and device while a region runs, which a CUDA graph cannot do: learnt once, then known."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .select import true_slots

# a device's numbers, asked by the host
_ASKED = {
    Tensor.tolist,
    Tensor.item,
    Tensor.cpu,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.__contains__,
    torch.equal,
    torch.allclose,
    torch.is_nonzero,
}
# a device's tensors, made of the host's
_MADE = {torch.tensor, torch.as_tensor, Tensor.to, Tensor.cuda}
_INDEXED = {Tensor.__getitem__, Tensor.__setitem__}
_REPEATED = {torch.repeat_interleave, Tensor.repeat_interleave}
_FOUND = {torch.nonzero, Tensor.nonzero, torch.argwhere, torch.where}
_DISTINCT = {torch.unique, Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive, torch.bincount}
# sizes, bounds and steps may be tensors without dimensions, which are asked for their numbers
_SIZED = {torch.arange, torch.linspace, torch.full, torch.zeros, torch.ones, torch.empty}
_SIZED_OWN = {
    *(Tensor.view, Tensor.reshape, Tensor.expand, Tensor.repeat, Tensor.narrow, Tensor.unflatten),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full),
    *(torch.split, Tensor.split, torch.tensor_split, Tensor.tensor_split, torch.narrow, torch.reshape),
}


class HostValues(TorchFunctionMode):
    """Learns, and then knows, what one run after another of the same computation passes between host and device.

    Known are numbers that the host asks of the device, tensors that it makes for it, and how many entries of a mask are
    true; which ones is found on the device, for other inputs of the region have others. Whatever else would differ for
    other inputs is found out by running on some (`same`).
    """

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
        return len(self.values) == len(other.values) and all(map(_equal, self.values, other.values))

    def _known(self, value: Callable[[], Any]) -> Any:
        """The next value, noted or given again: a copy, as the computation may write into it."""
        if self._next is None:
            found = value()
            self.values.append(_copy(found))
            return found
        if self._next >= len(self.values):
            raise RuntimeError("it asks the device for more than it did before")
        self._next += 1
        return _copy(self.values[self._next - 1])

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        named: dict[str, Any] = kwargs or {}
        first: Any = args[0] if args else None
        on_device = _on_device(first)
        target = _target(func, args, named) if func in _MADE else None
        asked = on_device and (func in _ASKED or (target is not None and target.type == "cpu"))
        made = not on_device and target is not None and target.type != "cpu"
        if asked or made or (on_device and func in _DISTINCT):
            return self._known(lambda: func(*args, **named))
        if on_device and func in _INDEXED:
            given = args[2] if len(args) > 2 else None  # what is written there
            filled = given is not None and (not isinstance(given, Tensor) or given.numel() == 1)
            args = (first, self._index(args[1], first.device, filled), *args[2:])
            if isinstance(given, Tensor) and given.dim() > 0 and not _on_device(given):
                args = (*args[:2], self._known(lambda: given.to(first.device)))
        elif func in _REPEATED and named.get("output_size") is None:
            repeats = named["repeats"] if "repeats" in named else args[min(1, len(args) - 1)]
            if _on_device(repeats) and repeats.dim() > 0:
                named = {**named, "output_size": self._known(lambda: int(repeats.sum()))}
        elif on_device and func in _FOUND and len(args) == 1:
            found = self._positions(first)
            together = func is not torch.where and not named.get("as_tuple")
            return torch.stack(found, dim=1) if together else found
        elif on_device and func in (torch.masked_select, Tensor.masked_select):
            values, mask = torch.broadcast_tensors(first, args[1])
            return values[self._positions(mask)]
        elif func in _SIZED:
            args, named = tree_map(self._number, args), tree_map(self._number, named)
        elif func in _SIZED_OWN and isinstance(first, Tensor):
            args, named = (first, *tree_map(self._number, args[1:])), tree_map(self._number, named)
        elif func is Tensor.copy_ and on_device and not _on_device(args[1]):
            args = (first, self._known(lambda: args[1].to(first.device)), *args[2:])
        return func(*args, **named)

    def _number(self, x: Any) -> Any:
        return self._known(x.item) if _on_device(x) and x.dim() == 0 else x

    def _index(self, index: Any, device: torch.device, filled: bool) -> tuple:
        """An index into a device's tensor, its masks and the host's numbers replaced by numbers on the device."""
        found: list[Any] = []
        for x in index if isinstance(index, tuple) else (index,):
            if isinstance(x, (list, range)):
                x = torch.as_tensor(x)
            elif isinstance(x, slice):
                x = slice(*map(self._number, (x.start, x.stop, x.step)))
            if isinstance(x, Tensor) and x.dim() > 0 and not _on_device(x):
                own = x.nonzero(as_tuple=True) if x.dtype == torch.bool else (x,)
                found += [self._known(partial(y.to, device)) for y in own]
            elif _on_device(x) and x.dtype == torch.bool and x.dim() > 0 and not filled:
                found += self._positions(x)
            else:
                found.append(x if isinstance(x, Tensor) and x.dtype == torch.bool else self._number(x))
        return tuple(found)

    def _positions(self, mask: Tensor) -> tuple[Tensor, ...]:
        """Where a mask is true, in order, by dimension: of numbers that are known the device asks nothing."""
        true = mask.flatten() != 0
        at = true_slots(true, self._known(lambda: int(true.sum())))
        found: list[Tensor] = []
        for size in reversed(mask.shape):
            found.insert(0, at % size)
            at = at // size
        return tuple(found)


def _on_device(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type != "cpu"


def _target(func: Any, args: tuple, kwargs: dict) -> torch.device | None:
    """The device that a call which makes a tensor, or moves one, names."""
    if func is Tensor.cuda:
        return torch.device("cuda")
    for x in (*args[1:], *kwargs.values()):
        if isinstance(x, Tensor):
            return x.device
        if isinstance(x, (torch.device, str)):
            return torch.device(x)
    return None


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_copy, value)) if isinstance(value, tuple) else deepcopy(value)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.device == other.device and torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
