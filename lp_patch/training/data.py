"""Training samples: conversations in LLaVA's JSON format, and batches of them with labels on the answers alone.

What nothing can be learned from is left out, counted and named, never trained on: see `ConversationDataset` for what a
file shows, `ConversationCollator` for what only a picture or a token shows, `PrunerTrainer` for what comes of it.
"""

import json
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ConfigError, UnsupportedInputError

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}
IGNORED = -100  # a label that is not learned, as in transformers


class ConversationDataset(Dataset):
    """Samples of a file in LLaVA's format: ``[{"image": name(s), "conversations": [{"from", "value"}, ...]}, ...]``.

    "from" is "human" or "gpt" in turn; "<image>" in a human turn says where an image stands. Samples without an image
    are left out (LearnPruner, section 4). So are those that cannot be read as above, and those without an answer: with
    a warning, and an error if no other is left. Only a file without any answer is taken for prompts, to distill.

    Args:
        path: the JSON file.
        images: folder that image names start from; None: the file's own.
        share: of the samples that are left to use, in (0, 1], drawn by `seed`.
        seed: of the draw.

    Attributes:
        samples: those in use, as the file has them.
        skipped: how many have no image.
        faulty: the others left out, each by name and reason.

    Raises:
        ConfigError: a `share` out of range.
        UnsupportedInputError: the file holds something else, or no sample that can be learned from.
    """

    def __init__(
        self, path: str | Path, images: str | Path | None = None, *, share: float = 1.0, seed: int = 0
    ) -> None:
        path = Path(path)
        if not 0 < share <= 1:
            raise ConfigError(f"share must lie in (0, 1], got {share!r}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UnsupportedInputError(f"{str(path)!r} is not JSON: {error}") from error
        if not isinstance(content, list) or not all(isinstance(x, dict) and "conversations" in x for x in content):
            raise UnsupportedInputError(
                f'{str(path)!r} must hold a list of samples with "conversations", as LLaVA\'s files do'
            )
        self.images = path.parent if images is None else Path(images)
        shown = [(_name(number, sample), sample) for number, sample in enumerate(content) if sample.get("image")]
        self.skipped = len(content) - len(shown)
        if not shown:
            raise UnsupportedInputError(f"none of the {len(content)} samples in {str(path)!r} has an image")
        answered = any(_answered(sample) for _, sample in shown)
        faults = [_fault(sample, answered) for _, sample in shown]
        self.faulty = [f"{name}: {fault}" for (name, _), fault in zip(shown, faults, strict=True) if fault]
        if len(self.faulty) == len(shown):
            raise UnsupportedInputError(
                f"none of the {len(shown)} samples with an image in {str(path)!r} can be learned from: "
                + listed(self.faulty)
            )
        if self.faulty:
            warnings.warn(
                f"{len(self.faulty)} of the {len(shown)} samples with an image in {str(path)!r} cannot be learned from "
                f"and are left out: {listed(self.faulty)}",
                stacklevel=2,
            )
        sound = [named for named, fault in zip(shown, faults, strict=True) if not fault]
        if share < 1:
            sound = random.Random(seed).sample(sound, max(1, round(share * len(sound))))
        self._names, self.samples = zip(*sound, strict=True)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"name", "messages": chat messages, "images": RGB pictures in the order of their marks}.

        Where a picture cannot be opened {"name", "fault": why}: an exception would end the epoch.
        """
        from PIL import Image  # needed here alone

        name, sample = self._names[index], self.samples[index]
        pictures = []
        for file in _pictures(sample):
            try:
                with Image.open(self.images / file) as image:
                    pictures.append(image.convert("RGB"))
            except Exception as error:  # whatever a broken file makes PIL stumble over
                return {"name": name, "fault": f"{file!r} cannot be opened, {type(error).__name__}: {error}"}
        return {"name": name, "messages": [_message(turn) for turn in sample["conversations"]], "images": pictures}


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first of them in one line."""
    more = f"; and {len(names) - limit} more" if len(names) > limit else ""
    return "; ".join(names[:limit]) + more


def _name(number: int, sample: dict) -> str:
    return f"sample {number}" + (f" (id {sample['id']!r:.80})" if "id" in sample else "")


def _pictures(sample: dict) -> list[Any]:
    return sample["image"] if isinstance(sample["image"], list) else [sample["image"]]


def _fault(sample: dict, answered: bool) -> str | None:
    """Why nothing can be learned from a sample with an image, by the file alone; `answered`: it needs an answer."""
    turns, pictures = sample["conversations"], _pictures(sample)
    if not isinstance(turns, list) or not turns:
        return "it has no turns"
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            return f'a turn must have "from" ({" or ".join(ROLES)}) and a text as "value", got {turn!r:.100}'
        if turn["from"] == "gpt" and IMAGE_MARK in turn["value"]:
            return f"an answer holds {IMAGE_MARK}"
    if not all(isinstance(name, str) for name in pictures):
        return f"images must be names of files, got {pictures!r:.100}"
    if (marks := sum(turn["value"].count(IMAGE_MARK) for turn in turns)) != len(pictures):
        return f"it has {marks} {IMAGE_MARK} marks for {len(pictures)} images"
    return "it has no answer" if answered and not _answered(sample) else None


def _answered(sample: dict) -> bool:
    """Whether an answer says anything."""
    turns = sample["conversations"] if isinstance(sample["conversations"], list) else []
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "gpt"]
    return any(isinstance(text, str) and text.strip() for text in texts)


def _message(turn: dict) -> dict:
    """A turn as a chat message, its text cut at the image marks."""
    content: list[dict] = []
    for number, text in enumerate(turn["value"].split(IMAGE_MARK)):
        if number:
            content.append({"type": "image"})
        if text.strip():
            content.append({"type": "text", "text": text.strip()})
    return {"role": ROLES[turn["from"]], "content": content}


def prompts(processor: Any, samples: Iterable[dict[str, Any]], batch: int = 8) -> Iterator[Any]:
    """What `ConversationDataset` samples ask first, as the processor gives it: in batches, padded on the left.

    Answers and what follows them play no part: such are the unlabelled prompts of `lp_patch.calibrate`.

    Raises:
        UnsupportedInputError: a picture cannot be opened, a sample begins with an answer or shows its pictures later.
    """
    left = iter(samples)
    while some := list(islice(left, batch)):
        texts, pictures = [], []
        for sample in some:
            if "fault" in sample:
                raise UnsupportedInputError(f"{sample['name']}: {sample['fault']}")
            asked = list(takewhile(lambda turn: turn["role"] == "user", sample["messages"]))
            marks = sum(part["type"] == "image" for turn in asked for part in turn["content"])
            if not asked or marks != len(sample["images"]):
                raise UnsupportedInputError(
                    f"{sample['name']}: its first question must show its {len(sample['images'])} pictures, not {marks}"
                )
            texts.append(processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
            pictures.append(sample["images"])
        yield processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")


class ConversationCollator:
    """Batches of `ConversationDataset` samples, as the model takes them, with labels (B, S) on the answers alone.

    A sample that nothing can be learned from is left out of its batch, with a warning that names it and the reason;
    "skipped" in the batch lists them too. Its picture cannot be opened, the processor or the chat template fails on it,
    an image stands in or after an answer, or no token of an answer is left before `max_length`. Where no sample is
    left, "skipped" is all there is: `GatedModel` refuses such a batch, `PrunerTrainer` repeats the one before.

    Args:
        processor: the checkpoint's, with a chat template and a fast tokenizer.
        max_length: longer conversations are cut at their end, within the answers; None: never. A prompt without an
            answer is not cut but left out, as what it asks stands at its end.
        dtype: of floating-point inputs (pixels).

    Raises:
        ConfigError: the processor has no chat template.
    """

    def __init__(self, processor: Any, *, max_length: int | None = None, dtype: torch.dtype = torch.float32) -> None:
        if getattr(processor, "chat_template", None) is None:
            raise ConfigError(
                f"{type(processor).__name__} has no chat template: set processor.chat_template to the base model's"
            )
        self.processor = processor
        self.max_length = max_length
        self.dtype = dtype

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Input ids, attention mask, pixels, and whatever else the processor makes; labels where there are answers.

        Raises:
            UnsupportedInputError: samples that are sound alone do not fit into one batch.
        """
        try:
            return self._batch(samples)
        except UnsupportedInputError as error:
            if len(samples) == 1:
                fault = f"{samples[0].get('name', 'a sample')}: {error}"
                warnings.warn(f"left out of training, {fault}", stacklevel=2)
                return {"skipped": [fault]}
        alone = [self([sample]) for sample in samples]  # which of them it is
        sound = [sample for sample, batch in zip(samples, alone, strict=True) if "skipped" not in batch]
        skipped = [name for batch in alone for name in batch.get("skipped", [])]
        return {**(self._batch(sound) if sound else {}), "skipped": skipped}

    def _batch(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of sound samples; UnsupportedInputError if one is not."""
        for sample in samples:
            if "fault" in sample:
                raise UnsupportedInputError(sample["fault"])
        texts, answers = zip(*(self._rendered(sample["messages"]) for sample in samples), strict=True)
        if any(answers) and not all(answers):
            raise UnsupportedInputError("samples with and without answers do not fit into one batch: separate them")
        pictures = [sample["images"] for sample in samples]
        try:
            batch = self.processor(
                images=pictures, text=list(texts), padding=True, padding_side="right", return_tensors="pt"
            )
        except Exception as error:  # each has its own for pictures that it cannot cut or texts with its own marks
            raise UnsupportedInputError(f"the processor fails, {type(error).__name__}: {error}") from error
        inputs = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in batch.items()}
        if any(answers):
            inputs["labels"] = self._labels(inputs, texts, answers)
        limit, shape = self.max_length, inputs["input_ids"].shape
        if limit is not None:
            if not any(answers) and shape[1] > limit:
                raise UnsupportedInputError(f"a prompt of {shape[1]} tokens, longer than max_length={limit}")
            inputs = {k: v[:, :limit] if v.shape == shape else v for k, v in inputs.items()}
        if any(answers) and not bool((inputs["labels"][:, 1:] != IGNORED).any(dim=1).all()):
            raise UnsupportedInputError(
                "no token of an answer"
                + ("" if limit is None else f" before max_length={limit} (of {shape[1]} tokens)")
            )
        return inputs

    def _rendered(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The prompt, and where its answers begin and end."""

        def render(count: int, ask: bool) -> str:
            try:
                return self.processor.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)
            except Exception as error:  # templates raise what they like, as for two human turns in a row
                raise UnsupportedInputError(f"the chat template fails, {type(error).__name__}: {error}") from error

        if not messages:
            raise UnsupportedInputError("it has no turns")
        text = render(len(messages), ask=messages[-1]["role"] == "user")
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            content = message["content"]  # a text, or a list of parts
            shows = isinstance(content, list) and any(part["type"] == "image" for part in content)
            if shows and (spans or message["role"] == "assistant"):
                raise UnsupportedInputError("an image in or after the first answer: put all images before it")
            if message["role"] != "assistant":
                continue
            before, after = render(index, ask=True), render(index + 1, ask=False)
            if not text.startswith(before) or not text.startswith(after):
                raise UnsupportedInputError(
                    "this chat template renders a turn differently once others follow, so answers cannot be told "
                    "apart: set processor.chat_template to one that only appends"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _labels(
        self, inputs: dict[str, Tensor], texts: Sequence[str], answers: Sequence[list[tuple[int, int]]]
    ) -> Tensor:
        """(B, S) int64: the ids of the answers at `answers` in `texts`, and -100."""
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        for row, (text, spans, length) in enumerate(zip(texts, answers, lengths, strict=True)):
            encoded = self.processor.tokenizer(text, return_offsets_mapping=True)
            inside = torch.tensor(
                [any(a < stop and b > start for a, b in spans) for start, stop in encoded["offset_mapping"]]
            )
            if not inside.any():
                continue
            # counted from the end: images, which come before the first answer, take more tokens than their marks
            after = len(inside) - int(inside.nonzero()[0])
            ids = inputs["input_ids"][row, length - after : length]
            if ids.tolist() != encoded["input_ids"][-after:]:
                raise UnsupportedInputError("the processor and its tokenizer make other tokens of an answer")
            labels[row, length - after : length] = torch.where(inside[-after:], ids, IGNORED)
        return labels
