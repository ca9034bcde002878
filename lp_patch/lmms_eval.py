"""lmms-eval (tried with 0.7.3) on a patched model: its own model classes, patched once they are made.

    lmms-eval eval --model lp_patch --model_args base=llava_hf,pretrained=FOLDER,tokens=64 --tasks TASK

`base` is a model of lmms-eval; options of `lp_patch.apply` patch it; all other arguments are the base's. lmms-eval
finds this by the entry point of its group "lmms_eval.models" and imports it; lp_patch itself never does.
"""

import dataclasses
from functools import partial
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.utils import simple_parse_args_string
from tqdm.auto import tqdm

from .config import PruningConfig
from .errors import ConfigError
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
        base = get_model(given.pop("base"), force_simple=cls.is_simple)
        options = {name: given.pop(name) for name in OPTIONS & given.keys()}
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        model = base(**given, **more)
        model.patch = apply(model.model, **options)
        model.loglikelihood = partial(loglikelihood, model)
        print(model.patch)
        return model

    def loglikelihood(self, requests: list) -> list:
        """Never called: the base's answers."""
        raise NotImplementedError

    generate_until = generate_until_multi_round = loglikelihood


class PatchedChat(Patched):
    """The same with the base's chat class, where it has one; ``--force_simple`` takes the other."""

    is_simple = False


@torch.inference_mode()
def loglikelihood(model: Any, requests: list) -> list[tuple[float, bool]]:
    """In place of the base's: the mean loss of each given answer, and whether it is what greedy steps would say.

    An answer must not choose what its own prompt keeps: in generation it is not there yet. So only what stands before
    it asks, and only the answer is scored. llava_hf's own, in 0.7.3, counts its prompt without the pictures' tokens,
    and fails with transformers 5.
    """
    processor, found = _processor(model), []
    for request in tqdm(requests, desc="loglikelihood", disable=model.rank != 0):
        question, target, doc_to_visual, number, task, split = request.args
        doc = model.task_dict[task][split][number]
        answer = target if isinstance(target, str) else target(doc)
        pictures = [{"type": "image", "image": picture} for picture in doc_to_visual(doc) or ()]
        conversation = [
            {"role": "user", "content": [*pictures, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]},
        ]
        inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
        inputs = inputs.to(model.model.device, model.model.dtype)
        ids = inputs["input_ids"]
        start = _start(processor.tokenizer, ids, answer)
        prompt = torch.arange(ids.shape[1], device=ids.device)[None] < start
        with model.patch.asking(prompt):
            said = model.model(**inputs).logits[0, start - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(said, ids[0, start:])
        found.append((float(loss), bool((said.argmax(dim=-1) == ids[0, start:]).all())))
    return found


def _processor(model: Any) -> Any:
    """The base's processor, which each class calls otherwise."""
    for value in vars(model).values():
        if hasattr(value, "apply_chat_template") and hasattr(value, "image_processor"):
            return value
    raise ConfigError(f"{type(model).__name__} holds no processor with a chat template, by which answers are scored")


def _start(tokenizer: Any, ids: torch.Tensor, continuation: str) -> int:
    """Where the continuation begins in ids (1, S)."""
    text, length = continuation.strip(), ids.shape[1]
    for start in range(length - 1, -1, -1):
        if text in tokenizer.decode(ids[0, start:]):
            return start
    raise ConfigError(f"the answer {continuation!r} that was to be scored is not at the end of the prompt")


MANIFEST = ModelManifest(
    model_id="lp_patch",
    simple_class_path="lp_patch.lmms_eval.Patched",
    chat_class_path="lp_patch.lmms_eval.PatchedChat",
)
