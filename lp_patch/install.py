"""Putting hooks, wrapped methods and attention taps on a live model, and taking them off again, bit for bit."""

import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import wrapt
from torch import nn


class MethodWrapper(wrapt.FunctionWrapper):
    """A wrapped method of one instance that can be copied and pickled with it."""

    def __deepcopy__(self, memo: dict) -> "MethodWrapper":
        return MethodWrapper(deepcopy(self.__wrapped__, memo), deepcopy(self._self_wrapper, memo))

    def __copy__(self) -> "MethodWrapper":
        return MethodWrapper(self.__wrapped__, self._self_wrapper)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return MethodWrapper, (self.__wrapped__, self._self_wrapper)


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
        setattr(module, name, MethodWrapper(getattr(module, name), wrapper))
        self.note(partial(_restore, module, name, before))

    def note(self, undo: Callable[[], None]) -> None:
        """Remember how to take one thing back."""
        self._undo.append(undo)

    def remove(self) -> None:
        """Take everything back, the latest first. Does nothing the second time."""
        while self._undo:
            self._undo.pop()()


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


def forget_compiled() -> None:
    """A model compiled before a hook came or went would silently run without noticing."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _restore(module: nn.Module, name: str, before: Any) -> None:
    if before is None:
        delattr(module, name)
    else:
        setattr(module, name, before)
