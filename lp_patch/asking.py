"""Who may ask in stage 2: the prompt, as generate(), labels and `patch.asking` tell it from answers.

around_generate, around_candidates, around_prepare    how many of a forward's tokens were generated, or are guesses
before_model                                          labels
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .compat import CANDIDATE_METHOD, PREPARE_METHOD
from .errors import UnsupportedInputError, UnsupportedModelError
from .install import Installation


class Asking:
    """The hooks on the whole model. `state.local` has what one thread was told."""

    state: Any

    def install_asking(self, on: Installation, model: nn.Module) -> None:
        """Put the hooks on the model."""
        if hasattr(model, "generate"):
            wrappers = {
                "generate": self.around_generate,
                CANDIDATE_METHOD: self.around_candidates,
                PREPARE_METHOD: self.around_prepare,
            }
            for name, wrapper in wrappers.items():
                if not hasattr(model, name):
                    raise UnsupportedModelError(
                        f"{type(model).__name__}.generate() has no {name}, by which lp_patch tells the prompt from "
                        "what was generated: this transformers is newer than lp_patch knows"
                    )
                on.wrap(model, name, wrapper)
        on.before(model, self.before_model)

    def around_generate(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps generate(): only inside it is anything generated; an assistant may be the same model."""
        local = self.state.local
        if not local.generating:
            local.call = None  # what a forward that failed has left
        before, local.generating, local.width = (local.generating, local.width), True, None
        try:
            return wrapped(*args, **kwargs)
        finally:
            local.generating, local.width = before

    def around_candidates(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps the start of assisted decoding, whose first forward shows the prompt and guesses after it."""
        ids = arguments_of(wrapped, args, kwargs).get("input_ids")
        self.state.local.width = None if ids is None else ids.shape[1]
        return wrapped(*args, **kwargs)

    def around_prepare(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps what makes a forward's inputs: notes how many of the ids come after the prompt."""
        inputs, local = wrapped(*args, **kwargs), self.state.local
        ids, given = args[0] if args else kwargs.get("input_ids"), inputs.get("input_ids")
        if local.generating and ids is not None:
            local.width = ids.shape[1] if local.width is None else local.width
            if given is not None:
                local.prepared = (weakref.ref(given), ids.shape[1] - local.width)
        return inputs

    @torch.compiler.disable
    def before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Labels, and what generate() made: these tokens do not ask."""
        local = self.state.local
        local.labels = argument(module, "labels", args, kwargs)
        given, generated = local.prepared
        local.generated = generated if given is not None and given() is kwargs.get("input_ids") else 0
        local.prepared = (None, 0)

    @contextmanager
    def asking(self, mask: Tensor) -> Iterator[None]:
        """Within the block, only tokens where `mask` (B, S) bool says so ask in stage 2; for this thread."""
        local = self.state.local
        before, local.asking = local.asking, mask
        try:
            yield
        finally:
            local.asking = before

    def asking_of(self, generated: int, batch: int, length: int, seen: int) -> Tensor | None:
        """The mask of `asking` for a forward of `length` new tokens after `seen` ones: (B, length), or None."""
        mask = self.state.local.asking
        if mask is None:
            return None
        prompt = length - generated
        if mask.dim() != 2 or batch % len(mask) or mask.shape[1] not in (length, prompt, seen + prompt):
            raise UnsupportedInputError(
                f"patch.asking(mask): the mask must be (batch, tokens) of the prompt, ({batch}, {prompt}) here, got "
                f"{tuple(mask.shape)}"
            )
        mask = mask.bool().repeat_interleave(batch // len(mask), dim=0)  # beams
        own = mask[:, -min(mask.shape[1], length if mask.shape[1] == length else prompt) :]
        return nn.functional.pad(own, (0, length - own.shape[1]))


def argument(module: nn.Module, name: str, args: tuple, kwargs: dict) -> Any:
    """An argument of a module's forward, by keyword or by position; None if it was not given."""
    if name in kwargs or not args:
        return kwargs.get(name)
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args, strict=False)).get(name)


def arguments_of(method: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call, by name, those in **kwargs too."""
    bound = _signature(getattr(method, "__func__", method), hasattr(method, "__func__")).bind(*args, **kwargs).arguments
    return {**bound, **bound.get("kwargs", {})}


@functools.cache
def _signature(function: Callable, bound: bool) -> inspect.Signature:
    """Of a method, without its first argument: asked for in every call, and slow to make."""
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[bound:])
