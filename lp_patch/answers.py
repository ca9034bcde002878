"""What a model answers to prompts, and how probable it finds an answer: what `evaluate` and `calibrate` share."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import PruningConfig
from .errors import ConfigError, UnsupportedInputError
from .handle import Patch
from .patch import apply, find_patch
from .registry import unwrap

Prompt = dict[str, Any]


class Answer(NamedTuple):
    """What was generated for B prompts.

    Attributes:
        tokens: (B, T) int64.
        valid: (B, T) bool: up to the end token, which counts.
    """

    tokens: Tensor
    valid: Tensor


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """The model without a patch of ours, in evaluation mode, without gradients; at the end all is as it was.

    Raises:
        ConfigError: it cannot generate answers.
    """
    if not hasattr(model, "generate"):
        raise ConfigError(f"{type(model).__name__} cannot generate answers: give the whole model, with its head")
    patch = find_patch(model)
    training = [module for module in model.modules() if module.training]
    if patch is not None:
        patch.remove()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        if patch is not None:
            patch.put_back()


def prepare(model: nn.Module, config: PruningConfig | Mapping[str, Any], pruner: Any) -> Patch:
    """A patch of these settings, checked and ready to be put on the model, which is left without it."""
    patch = apply(model, config, pruner=pruner)
    patch.remove()
    return patch


@contextmanager
def installed(patch: Patch | None) -> Iterator[None]:
    """The patch on its model; None: no patch."""
    if patch is None:
        yield
        return
    patch.put_back()
    try:
        yield
    finally:
        patch.remove()


def check_prompts(prompts: object) -> Iterator[Prompt]:
    """Each processor output of an iterable as a dict.

    Raises:
        ConfigError: they are no iterable of processor outputs.
        UnsupportedInputError: one cannot be answered as it is.
    """
    if isinstance(prompts, Mapping) or hasattr(prompts, "input_ids") or not isinstance(prompts, Iterable):
        raise ConfigError(
            f"prompts must be an iterable of processor outputs, got {type(prompts).__name__}: put one alone in a list"
        )
    for number, given in enumerate(prompts):
        ids = given.get("input_ids") if hasattr(given, "get") else None
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ConfigError(
                f"prompt {number} is no processor output with input_ids (batch, tokens): got {type(given).__name__}. "
                'Call the processor with return_tensors="pt"'
            )
        for name in ("labels", "position_ids"):
            if name in given:
                raise UnsupportedInputError(f"prompt {number} holds {name}: give what a processor makes of a question")
        mask = given.get("attention_mask")
        if mask is not None and not mask[:, -1].all():
            raise UnsupportedInputError(
                f'prompt {number} is padded on the right, after which nothing can be generated: padding_side="left"'
            )
        yield {name: given[name] for name in given}


def on_device(model: Any, prompt: Prompt) -> Prompt:
    """The prompt's tensors where the model is."""
    return {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in prompt.items()}


def greedy(model: Any, prompt: Prompt, new_tokens: int, **options: Any) -> Answer:
    """The greedy answers, at most `new_tokens` long, on the model's device; `options` are generate()'s."""
    options = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1, **options}
    output = model.generate(**on_device(model, prompt), **options)
    tokens = output[:, prompt["input_ids"].shape[1] :]
    end = unwrap(model).generation_config.eos_token_id
    ends = torch.isin(tokens, torch.tensor([] if end is None else end, device=tokens.device, dtype=tokens.dtype))
    return Answer(tokens, ends.cumsum(dim=1) - ends.long() == 0)


def log_probabilities(model: Any, patch: Patch | None, prompt: Prompt, answer: Tensor) -> Tensor:
    """How probable each next token was while this answer was given.

    The answer is read after the prompt in one forward (teacher forcing). It never asks in stage 2, as nothing that
    `generate()` makes does.

    Args:
        patch: the one that is on the model, or None.
        answer: (B, T) int64.

    Returns:
        (B, T, V) float32 log-probabilities, on the model's device.
    """
    shape, length = tuple(prompt["input_ids"].shape), answer.shape[1]
    given = on_device(model, prompt)
    answer = answer.to(given["input_ids"].device)
    asks = torch.cat([torch.ones_like(given["input_ids"]), torch.zeros_like(answer)], dim=1).bool()
    for name, x in given.items():
        # what has a number for each token: ids, the mask, types of tokens, which are 0 for text
        if isinstance(x, Tensor) and tuple(x.shape) == shape and not x.is_floating_point():
            more = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}.get(name, torch.zeros_like(answer))
            given[name] = torch.cat([x, more.to(x.dtype)], dim=1)
    if "logits_to_keep" in inspect.signature(unwrap(model).forward).parameters:
        given["logits_to_keep"] = length + 1
    if patch is None:
        logits = model(**given, use_cache=False).logits
    else:
        with patch.asking(asks):
            logits = model(**given, use_cache=False).logits
    return logits[:, -length - 1 : -1].float().log_softmax(dim=-1)


def true_averages(patch: Patch) -> list[float]:
    """Of each row of the latest prefill, the visual tokens that it ran on, averaged over the decoder layers."""
    assert patch.trace is not None  # asked after a prefill
    return [fmean(layers) for layers in patch.trace.tokens_per_layer]


def visual_tokens(patch: Patch) -> list[int]:
    """Of each row of the latest prefill, the visual tokens that it showed."""
    assert patch.trace is not None
    return patch.trace.visual_tokens
