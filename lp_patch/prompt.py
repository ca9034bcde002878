"""The prompt of a forward that shows images, as numbers on the host."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .read import Call, Reader
from .registry import ModalityPart


@dataclass(frozen=True)
class Prompt:
    """A prompt as numbers on the host, (B, S) bool each.

    Attributes:
        modalities: those shown.
        masks: for each of them its placeholders, also those that the attention mask hides.
        structural: placeholders without a picture (line breaks of a tiling): kept and not counted.
        real: not padding.
        jumps: where transformers sees a new packed sequence begin, or None if it does not look.
        asks: tokens that may ask, or None if all may.
        ids: (B, S) int64, for families that tell images apart by them.
    """

    modalities: list[ModalityPart]
    masks: list[np.ndarray]
    structural: np.ndarray
    real: np.ndarray
    jumps: np.ndarray | None
    asks: np.ndarray | None
    ids: np.ndarray | None

    @property
    def placeholders(self) -> np.ndarray:
        """All that a feature row replaces."""
        return np.logical_or.reduce(self.masks)


def read_host(
    reader: Reader, call: Call, embeds: Tensor | None, mask: Tensor | None, asking: Tensor | None, kwargs: dict
) -> dict[str, np.ndarray]:
    """What the device alone knows of a prompt, (B, S) int64 each, by name.

    This is the one wait for the device in a prefill.

    Args:
        embeds: (B, S, D), merged, for families with line breaks; or None, before they are.
        mask: (B, S) of the caller's attention mask, or None if all are real.
        asking: (B, S) bool, or None.
        kwargs: of the language model's forward, or of that of the module that merges.
    """
    modalities = [m for m in reader.parts.modalities if m.name in call.features]
    shape = call.ids.shape if embeds is None else embeds.shape[:2]  # type: ignore[union-attr]
    device = call.ids.device if embeds is None else embeds.device  # type: ignore[union-attr]
    wanted: dict[str, Tensor] = {}
    if call.ids is not None and call.visual is None:
        wanted["ids"] = call.ids
    else:
        wanted.update({m.name: reader.placeholders(call, m.placeholder) for m in modalities})
    if reader.parts.adapter.structural is not None and embeds is not None:
        found = [reader.placeholders(call, m.placeholder).to(device) for m in modalities]
        wanted["structural"] = reader.structural(embeds, torch.stack(found).any(dim=0))  # type: ignore[assignment]
    if mask is not None:
        wanted["real"] = mask
    if (ids := text_positions(kwargs)) is not None:
        wanted["positions"] = ids.expand(shape)
    if call.labels is not None:
        wanted["labels"] = call.labels
    if asking is not None:
        wanted["asking"] = asking
    # one transfer: labels may be negative, ids are far from the ends of int64
    stacked = torch.stack([x.to(device, torch.long) for x in wanted.values()]).cpu().numpy()
    return dict(zip(wanted, stacked, strict=True))


def make_prompt(reader: Reader, call: Call, host: dict[str, np.ndarray]) -> Prompt:
    """The prompt that these numbers tell, for the modalities that the call shows."""
    modalities = [m for m in reader.parts.modalities if m.name in call.features]
    if "ids" in host:
        masks = [host["ids"] == m.placeholder for m in modalities]
    else:
        masks = [host[m.name] != 0 for m in modalities]
    real = host["real"] != 0 if "real" in host else np.ones(masks[0].shape, dtype=bool)
    structural = host["structural"] != 0 if "structural" in host else np.zeros_like(real)
    jumps = None
    if "positions" in host:
        jumps = np.pad(np.diff(host["positions"], axis=1) != 1, ((0, 0), (1, 0)))
        jumps[:, 1:] &= real[:, 1:] & real[:, :-1]
    asks = None
    if "labels" in host:
        text = real & ~np.logical_or.reduce(masks)
        asks = host["labels"] == -100
        asks |= ~(asks & text).any(axis=1, keepdims=True)  # labels on everything mark no answer
    if call.generated:
        asks = np.ones_like(real) if asks is None else asks
        asks[:, -call.generated :] = False
    if "asking" in host:
        asks = (host["asking"] != 0) & (True if asks is None else asks)
    return Prompt(modalities, masks, structural, real, jumps, asks, host.get("ids"))


def text_positions(kwargs: dict) -> Tensor | None:
    """(B or 1, S) position ids, in the axis that counts text; None where transformers looks for no packing in them."""
    ids = kwargs.get("position_ids")
    if ids is None or (ids.dim() == 3 and ids.shape[0] != 4):
        return None
    return ids[0] if ids.dim() == 3 else ids
