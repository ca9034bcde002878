"""The front process: as many placeholders for a picture as will be left of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .internals import PromptReplacement, PromptUpdateDetails
from .options import ServerOptions, options_of


class PrunedInfo:
    """Goes before a family's processing info: pictures only, each as long as it will be."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """As many pictures as the family takes, nothing else."""
        limits = super().get_supported_mm_limits()  # type: ignore[misc]
        return {modality: limit if modality == "image" else 0 for modality, limit in limits.items()}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """What the largest picture keeps; vLLM plans its memory with it."""
        return {"image": options_of(self.get_hf_config()).budget(self.get_max_image_tokens()).stage1}  # type: ignore[attr-defined]


class PrunedProcessor:
    """Goes before a family's multimodal processor."""

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        options = options_of(self.info.get_hf_config())  # type: ignore[attr-defined]
        return [shortened(update, options) for update in updates if update.modality == "image"]


def shortened(update: PromptReplacement, options: ServerOptions) -> PromptReplacement:
    """The same replacement with as many placeholders as `options` leave of them; what stands around them stays."""

    def replacement(item: int) -> PromptUpdateDetails:
        content = update.replacement(item) if callable(update.replacement) else update.replacement
        details = content if isinstance(content, PromptUpdateDetails) else PromptUpdateDetails.from_seq(content)
        marks = torch.ones(len(details.full), dtype=torch.bool)
        if details.is_embed is not None:
            marks = details.is_embed(details.full)
        gone = set(marks.nonzero()[options.budget(int(marks.sum())).stage1 :, 0].tolist())
        left = [token for place, token in enumerate(details.full) if place not in gone]
        return PromptUpdateDetails(full=left, is_embed=details.is_embed)

    return PromptReplacement(modality=update.modality, target=update.target, replacement=replacement)
