"""Putting hooks, wrapped methods and attention taps on a live model, and taking them off again, bit for bit."""

import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import count
from typing import Any

import torch
import wrapt
from torch import nn


class MethodWrapper(wrapt.FunctionWrapper):
    """A wrapped method of one instance that can be copied and pickled with it."""

    def __init__(self, wrapped: Callable, wrapper: Callable, enabled: tuple[bool, ...] = (True,)) -> None:
        # wrapt lets nobody replace its switch, but asks for its truth in each call: an empty list is off
        switch: Any = list(enabled)
        super().__init__(wrapped, wrapper, switch)
        self._self_switch = switch

    def disable(self) -> None:
        """Be the bare method from now on."""
        self._self_switch.clear()

    def __deepcopy__(self, memo: dict) -> "MethodWrapper":
        return MethodWrapper(deepcopy(self.__wrapped__, memo), deepcopy(self._self_wrapper, memo), self._self_switch)

    def __copy__(self) -> "MethodWrapper":
        return MethodWrapper(self.__wrapped__, self._self_wrapper, self._self_switch)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return MethodWrapper, (self.__wrapped__, self._self_wrapper, tuple(self._self_switch))


class Installation:
    """All that was put on one model, and how to take it back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    @property
    def active(self) -> bool:
        """Whether anything is on the model."""
        return bool(self._undo)

    def before(self, module: nn.Module, hook: Callable) -> None:
        """Run `hook` (module, args, kwargs) before the module's forward."""
        self.note(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable) -> None:
        """Run `hook` (module, args, kwargs, output) after the module's forward."""
        self.note(module.register_forward_hook(hook, with_kwargs=True).remove)

    def wrap(self, module: nn.Module, name: str, wrapper: Callable) -> None:
        """Wrap a non-forward method on the instance; undone by what its `__dict__` held before."""
        before = module.__dict__.get(name)
        ours = MethodWrapper(getattr(module, name), wrapper)
        setattr(module, name, ours)
        self.note(partial(_restore, module, name, ours, before))

    def note(self, undo: Callable[[], None]) -> None:
        """Remember how to take one thing back."""
        self._undo.append(undo)

    def remove(self) -> None:
        """Take everything back, the latest first. Does nothing the second time."""
        while self._undo:
            self._undo.pop()()


class LayerHooks:
    """Pre-hooks of many modules that come and go with a forward, before those of others.

    `register_forward_pre_hook` makes a handle for each, which takes longer than the layers' hooks themselves.
    """

    _numbers = count(-1, -1)  # torch counts its own upwards

    def __init__(self, hooks: list[tuple[nn.Module, Callable]]) -> None:
        self._hooks = hooks

    def put(self) -> Callable[[], None]:
        """Put them on; returns what takes them off again."""
        number = next(self._numbers)
        for module, hook in self._hooks:
            module._forward_pre_hooks_with_kwargs[number] = True
            module._forward_pre_hooks[number] = hook
            module._forward_pre_hooks.move_to_end(number, last=False)  # type: ignore[attr-defined]
        return partial(_take_off, [module for module, _ in self._hooks], number)


def _take_off(modules: list[nn.Module], number: int) -> None:
    for module in modules:
        module._forward_pre_hooks.pop(number, None)
        module._forward_pre_hooks_with_kwargs.pop(number, None)


def owner(hook: Any) -> Any:
    """The object whose method a hook is, also with arguments bound."""
    return getattr(getattr(hook, "func", hook), "__self__", None)


def unhook(module: nn.Module, of: object) -> None:
    """Take an object's hooks off a module that was copied with them (PEFT's modules_to_save): no handle knows it."""
    for hooks, extra in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if owner(hook) is of]:
            del hooks[key]
            extra.pop(key, None)


def forget_compiled(model: nn.Module) -> None:
    """Drop what was compiled around this model's kinds of modules, before a hook came or went.

    dynamo guards the type of each module that it looked into, but no hooks: it would silently run without noticing.
    """
    if "torch._dynamo" not in sys.modules:
        return
    kinds = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.")}
    try:
        from torch._dynamo import convert_frame
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code

        with convert_frame.compile_lock:
            for code in filter(None, [reference() for reference in convert_frame.input_codes.seen]):
                if any(_guarded(entry.guard_manager.root) & kinds for entry in _debug_get_cache_entry_list(code)):
                    reset_code(code)
    except (AttributeError, ImportError):  # no public way exists, and another version's private one may differ
        torch.compiler.reset()


def _guarded(manager: Any) -> set[type]:
    """The types of all objects that a compiled function's guards look at."""
    found: set[type] = set()
    managers = [manager]
    while managers:
        at = managers.pop()
        found.add(at.get_type_of_guarded_value())
        managers += at.get_child_managers()
        if hasattr(at, "get_key_value_managers"):  # a dict's; each pair may lack one
            managers += [x for pair in at.get_key_value_managers().values() for x in pair if x is not None]
    return found


def _restore(module: nn.Module, name: str, ours: MethodWrapper, before: Any) -> None:
    """Put back what was there before, unless something else has come on top of ours: that is not ours to take."""
    there = module.__dict__.get(name)
    if there is not ours:
        ours.disable()
        if there is not None:
            warnings.warn(
                f"{type(module).__name__}.{name} was wrapped or replaced after lp_patch wrapped it: that stays, and "
                "calls of lp_patch's own wrapper below it now do nothing but call the method",
                stacklevel=2,
            )
    elif before is None:
        delattr(module, name)
    else:
        setattr(module, name, before)
