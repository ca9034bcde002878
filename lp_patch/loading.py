"""A checkpoint, and a question to it, as the command line and the harness need them."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .errors import UnsupportedInputError

QUESTION = "What is in the picture?"


def load(name: str, device: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """A model in evaluation mode, and its processor.

    Args:
        name: a folder or a Hub id.
        device: None: a GPU if there is one.
        dtype: as torch names it; "auto": the checkpoint's own.
    """
    model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), AutoProcessor.from_pretrained(name)


def skeleton(name: str) -> Any:
    """The checkpoint's model without its weights: enough to see whether and where it can be patched."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name))


def ask(processor: Any, picture: Any, question: str = QUESTION) -> Any:
    """The inputs of one question about one picture, by the checkpoint's own chat template.

    Raises:
        UnsupportedInputError: it has none.
    """
    if getattr(processor, "chat_template", None) is None:
        raise UnsupportedInputError(
            f"{type(processor).__name__} has no chat template, by which a question is put: this checkpoint is no chat "
            "model, or its template is missing (processor.chat_template)"
        )
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
