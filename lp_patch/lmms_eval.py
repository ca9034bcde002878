"""lmms-eval (tried with 0.7.3) on a patched model: its own model classes, patched once they are made.

    lmms-eval eval --model lp_patch --model_args base=llava_hf,pretrained=FOLDER,tokens=64 --tasks TASK

`base` is a model of lmms-eval; options of `lp_patch.apply` patch it; all other arguments are the base's. lmms-eval
finds this by the entry point of its group "lmms_eval.models" and imports it; lp_patch itself never does.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.utils import simple_parse_args_string

from .config import PruningConfig
from .errors import ConfigError
from .handle import Patch
from .patch import apply

OPTIONS = {*(field.name for field in dataclasses.fields(PruningConfig)), "pruner"}


class Patched(lmms):
    """Stands in lmms-eval's registry; what it makes is an instance of the base's class, its model patched."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> Any:
        """The base's model, from the command line's arguments."""
        from lmms_eval.models import get_model  # which is still loading when it imports this

        given = simple_parse_args_string(arg_string)
        if "base" not in given:
            raise ConfigError("--model lp_patch needs base=NAME, a model of lmms-eval, in --model_args")
        base = get_model(given.pop("base"))
        options = {name: given.pop(name) for name in OPTIONS & given.keys()}
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        model = base(**given, **more)
        model.patch = apply(model.model, **options)
        model.loglikelihood = partial(loglikelihood, model, model.loglikelihood)
        print(model.patch)
        return model

    def loglikelihood(self, requests: list) -> list:
        """Never called: the base's answers."""
        raise NotImplementedError

    generate_until = generate_until_multi_round = loglikelihood


def loglikelihood(model: Any, scored: Any, requests: list) -> list:
    """The base's `loglikelihood`, in which only the prompt asks in stage 2, and only the continuation is scored.

    In generation the answer is not there yet when a prompt is pruned. lmms-eval's llava_hf counts its prompt without
    the pictures' tokens, so that its labels begin too early.
    """
    found = []
    for request in requests:
        _, target, _, number, task, split = request.args
        text = target if isinstance(target, str) else target(model.task_dict[task][split][number])
        with _prompt_asks(model.model, model.patch, model.tokenizer, text):
            found += scored([request])
    return found


@contextmanager
def _prompt_asks(model: Any, patch: Patch, tokenizer: Any, continuation: str) -> Iterator[None]:
    stack = ExitStack()

    def before(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ids = kwargs["input_ids"]
        prompt = torch.zeros_like(ids, dtype=torch.bool)
        prompt[:, : _start(tokenizer, ids, continuation)] = True
        stack.enter_context(patch.asking(prompt))
        if kwargs.get("labels") is not None:
            kwargs = {**kwargs, "labels": kwargs["labels"].masked_fill(prompt, -100)}
        return args, kwargs

    hook = model.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    try:
        with stack:
            yield
    finally:
        hook.remove()


def _start(tokenizer: Any, ids: torch.Tensor, continuation: str) -> int:
    """Where the continuation begins in ids (1, S)."""
    if len(ids) != 1:
        raise ConfigError(f"loglikelihood of a patched model takes one prompt at a time, got a batch of {len(ids)}")
    text, length = continuation.strip(), ids.shape[1]
    for start in range(length - 1, -1, -1):
        if text in tokenizer.decode(ids[0, start:]):
            return start
    raise ConfigError(f"the continuation {continuation!r} is not in the prompt that was to be scored")


MANIFEST = ModelManifest(model_id="lp_patch", simple_class_path="lp_patch.lmms_eval.Patched")
