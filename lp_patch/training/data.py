"""Training samples: conversations in LLaVA's JSON format, and batches of them with labels on the answers alone."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UnsupportedInputError

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}
IGNORED = -100  # a label that is not learned, as in transformers


class ConversationDataset(Dataset):
    """Samples of a file in LLaVA's format: ``[{"image": name(s), "conversations": [{"from", "value"}, ...]}, ...]``.

    "from" is "human" or "gpt" in turn; "<image>" in a human turn says where an image stands. Samples without an image
    are skipped (LearnPruner, section 4); `skipped` counts them.

    Args:
        path: the JSON file.
        images: folder that image names start from; None: the file's own.
        share: of the samples with images to use, in (0, 1], drawn by `seed`.
        seed: of the draw.
    """

    def __init__(
        self, path: str | Path, images: str | Path | None = None, *, share: float = 1.0, seed: int = 0
    ) -> None:
        path = Path(path)
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share!r}")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, list) or not all(isinstance(x, dict) and "conversations" in x for x in content):
            raise ValueError(f'{str(path)!r} must hold a list of samples with "conversations", as LLaVA\'s files do')
        self.images = path.parent if images is None else Path(images)
        shown = [sample for sample in content if sample.get("image")]
        self.skipped = len(content) - len(shown)
        if not shown:
            raise ValueError(f"none of the {len(content)} samples in {str(path)!r} has an image")
        if share < 1:
            shown = random.Random(seed).sample(shown, max(1, round(share * len(shown))))
        self.samples = shown

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"messages": chat messages, "images": RGB pictures in the order of their marks}."""
        sample = self.samples[index]
        messages = [_message(turn, sample) for turn in sample["conversations"]]
        names = sample["image"] if isinstance(sample["image"], list) else [sample["image"]]
        marks = sum(part["type"] == "image" for message in messages for part in message["content"])
        if marks != len(names):
            raise UnsupportedInputError(
                f"a sample has {marks} {IMAGE_MARK} marks for {len(names)} images: {sample!r:.300}"
            )
        return {"messages": messages, "images": [_open(self.images / name) for name in names]}


def _message(turn: dict, sample: dict) -> dict:
    """A turn as a chat message, its text cut at the image marks."""
    if turn.get("from") not in ROLES:
        raise UnsupportedInputError(
            f"a turn is from {turn.get('from')!r}, allowed are {', '.join(ROLES)}: {sample!r:.300}"
        )
    content: list[dict] = []
    for number, text in enumerate(turn["value"].split(IMAGE_MARK)):
        if number:
            content.append({"type": "image"})
        if text.strip():
            content.append({"type": "text", "text": text.strip()})
    return {"role": ROLES[turn["from"]], "content": content}


def _open(path: Path) -> Any:
    from PIL import Image  # needed here alone

    with Image.open(path) as image:
        return image.convert("RGB")


class ConversationCollator:
    """Batches of `ConversationDataset` samples, as the model takes them, with labels (B, S) on the answers alone.

    Args:
        processor: the checkpoint's, with a chat template and a fast tokenizer.
        max_length: longer prompts are cut at their end; None: never.
        dtype: of floating-point inputs (pixels).
    """

    def __init__(self, processor: Any, *, max_length: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(
                f"{type(processor).__name__} has no chat template: set processor.chat_template to the base model's"
            )
        self.processor = processor
        self.max_length = max_length
        self.dtype = dtype

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Input ids, attention mask, pixels, and whatever else the processor makes; labels where there are answers."""
        texts, answers = zip(*(self._rendered(sample["messages"]) for sample in samples), strict=True)
        pictures = [sample["images"] for sample in samples]
        batch = self.processor(
            images=pictures, text=list(texts), padding=True, padding_side="right", return_tensors="pt"
        )
        inputs = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in batch.items()}
        lengths = inputs["attention_mask"].sum(dim=1)
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for row, (text, spans) in enumerate(zip(texts, answers, strict=True)):
            after = self._labelled(text, spans)
            # counted from the end: images, which come before the first answer, take more tokens than their marks
            start = int(lengths[row]) - len(after)
            labels[row, start : int(lengths[row])] = torch.where(
                after, inputs["input_ids"][row, start : int(lengths[row])], IGNORED
            )
        if any(answers):
            inputs["labels"] = labels
        if self.max_length is not None:
            per_token = inputs["input_ids"].shape
            inputs = {k: v[:, : self.max_length] if v.shape == per_token else v for k, v in inputs.items()}
        return inputs

    def _rendered(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The prompt, and where its answers begin and end."""

        def render(count: int, ask: bool) -> str:
            return self.processor.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)

        text = render(len(messages), ask=messages[-1]["role"] == "user")
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                if spans and any(part["type"] == "image" for part in message["content"]):
                    raise UnsupportedInputError("an image after the first answer: put all images before it")
                continue
            before, after = render(index, ask=True), render(index + 1, ask=False)
            if not text.startswith(before) or not text.startswith(after):
                raise UnsupportedInputError(
                    "this chat template renders a turn differently once others follow, so answers cannot be told "
                    "apart: set processor.chat_template to one that only appends"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _labelled(self, text: str, spans: list[tuple[int, int]]) -> Tensor:
        """(n,) bool for the tokens from the first answer on: which belong to an answer."""
        if not spans:
            return torch.zeros(0, dtype=torch.bool)
        offsets = self.processor.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        first = next(i for i, (_, stop) in enumerate(offsets) if stop > spans[0][0])
        return torch.tensor([any(a < stop and start < b for a, b in spans) for start, stop in offsets[first:]])
