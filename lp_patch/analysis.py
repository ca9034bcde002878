"""What a model attends to, before anything is pruned: the analyses behind the method, as calls on any model.

look(model, inputs)          attention that each token receives, by layer and by who asks
cls_attention(model, inputs) attention of the vision encoder's [CLS], where a family has one; `sinks` finds its peaks

Both run the unpatched model once. Plots need the extra "show". LearnPruner (arXiv 2604.23950), sections 2 and 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention import Attended, install_tap
from .errors import UnsupportedInputError, UnsupportedModelError
from .install import Installation
from .patch import is_applied
from .registry import FULL, Parts, find_parts
from .score import received_attention, received_in_tower
from .show import need, rendered

if TYPE_CHECKING:
    from PIL.Image import Image

TEXT, LAST, EVERY = "text", "last", "every"  # who asks: all text after the last picture, the last token, every token


@dataclass(frozen=True)
class Look:
    """What `look` saw of B prompts of S tokens, in the L decoder layers that see all tokens.

    Attributes:
        layers: (L,), counted from 1.
        received: by who asks, (L, B, S) float32: attention that each token receives, averaged over heads and askers;
            0 for padding. Of one layer and prompt it sums to 1.
        visual: (B, S) bool, visual tokens.
        real: (B, S) bool, no padding.
        words: of each prompt, the W ids of the text after its last picture.
        maps: of each prompt, (L, W, V) float32, what each of these words gives to each of its V visual tokens.
    """

    layers: list[int]
    received: dict[str, Tensor]
    visual: Tensor
    real: Tensor
    words: list[list[int]]
    maps: list[Tensor]

    def share(self, asker: str = TEXT) -> Tensor:
        """(L, B): the share of the attention that goes to visual tokens, in each layer."""
        return (self.received[asker] * self.visual).sum(dim=2)

    def plot_layers(self, path: str | Path | None = None) -> "Image":
        """Attention to visual tokens by layer, one line for each who asks; a PIL image."""
        figure, axes = _figure("decoder layer", "share of attention on visual tokens")
        for asker in self.received:
            axes.plot(self.layers, self.share(asker).mean(dim=1).tolist(), marker="o", markersize=3, label=asker)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        return rendered(figure, path)

    def plot_positions(self, layer: int, asker: str = TEXT, path: str | Path | None = None, prompt: int = 0) -> "Image":
        """Attention by position in one prompt, visual tokens and text apart, in one layer; a PIL image."""
        figure, axes = _figure("position in the prompt", f"attention received in layer {layer}")
        received, visual = self.received[asker][self._number(layer), prompt], self.visual[prompt]
        for name, mask in (("visual", visual), ("text", self.real[prompt] & ~visual)):
            where = mask.nonzero().flatten()
            axes.scatter(where.tolist(), received[where].tolist(), s=4, label=name)
        axes.set_yscale("log")
        axes.legend(frameon=False)
        return rendered(figure, path)

    def plot_words(self, processor: Any, layer: int, path: str | Path | None = None, prompt: int = 0) -> "Image":
        """What each word of one prompt gives to its visual tokens, in their order, in one layer; a PIL image."""
        figure, axes = _figure("visual token", "")
        axes.imshow(self.maps[prompt][self._number(layer)].sqrt().numpy(), aspect="auto", interpolation="nearest")
        tokenizer = getattr(processor, "tokenizer", processor)
        words = self.words[prompt]
        axes.set_yticks(range(len(words)), [tokenizer.decode([x]) for x in words])
        return rendered(figure, path)

    def _number(self, layer: int) -> int:
        if layer not in self.layers:
            raise UnsupportedInputError(f"no attention of layer {layer} was seen: one of {self.layers}")
        return self.layers.index(layer)


@torch.no_grad()
def look(model: Any, inputs: Mapping[str, Any]) -> Look:
    """Run the unpatched model once on prompts with pictures and note what its decoder layers attend to.

    Layers with windows, or without keys, are left out.

    Args:
        model: as `apply` takes it.
        inputs: of its forward, with `input_ids` (B, S); padding anywhere.
    """
    parts = _unpatched(model)
    ids = inputs["input_ids"]
    visual = torch.zeros_like(ids, dtype=torch.bool)
    for modality in parts.modalities:
        visual |= ids == modality.placeholder
    if not visual.any(dim=1).all():
        raise UnsupportedInputError("every prompt must hold visual tokens, to see what they are given")
    mask = inputs.get("attention_mask")
    real = torch.ones_like(visual) if mask is None else mask.bool()
    order = torch.arange(ids.shape[1], device=ids.device)
    after = real & ~visual & (order > (order * visual).amax(dim=1, keepdim=True))
    if not after.any(dim=1).all():
        raise UnsupportedInputError("every prompt must have text after its last picture, which asks")
    last = torch.zeros_like(real).scatter(1, (order * real).argmax(dim=1, keepdim=True), True)
    asking = {name: x / x.sum(dim=1, keepdim=True) for name, x in ((TEXT, after), (LAST, last), (EVERY, real))}
    words = [row.nonzero().flatten() for row in after]
    seen: dict[int, tuple[dict[str, Tensor], list[Tensor]]] = {}

    def observe(index: int, _: Any, given: Attended) -> None:
        found = partial(received_attention, given.query, given.key, scaling=given.scaling, key_mask=real)
        received = {name: found(weight, sinks=given.sinks).cpu() for name, weight in asking.items()}
        alone = []
        for row, own in enumerate(words):  # each word asks alone: a batch of single queries
            query = given.query[row][:, own].transpose(0, 1)[:, :, None]
            key = given.key[row].expand(len(own), -1, -1, -1)
            sees = (real[row] & (order <= own[:, None]))[:, None]
            one = torch.ones(len(own), 1, device=ids.device)
            found_alone = received_attention(
                query, key, one, given.scaling, key_mask=sees, causal=False, sinks=given.sinks
            )
            alone.append(found_alone[:, visual[row]].cpu())
        seen[index] = received, alone

    on = Installation()
    try:
        for index, attention in enumerate(parts.attention):
            if parts.kinds.names[index] == FULL and attention is not None:
                on.note(install_tap(attention, partial(observe, index)))
        model(**inputs)
    finally:
        on.remove()
    if not seen:
        raise UnsupportedModelError(
            f"no decoder layer of {parts.adapter.family} sees all tokens through transformers' AttentionInterface"
        )
    layers = sorted(seen)
    return Look(
        [x + 1 for x in layers],
        {name: torch.stack([seen[x][0][name] for x in layers]) for name in asking},
        visual.cpu(),
        real.cpu(),
        [ids[row, own].tolist() for row, own in enumerate(words)],
        [torch.stack([seen[x][1][row] for x in layers]) for row in range(len(ids))],
    )


@torch.no_grad()
def cls_attention(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Attention of [CLS] to each of N patches in the vision layer that the features are of: (images or tiles, N).

    Rows sum to 1 less what [CLS] gives to itself. A sink is a patch far above the others on a place without content.

    Raises:
        UnsupportedModelError: the family's tower has no [CLS] in front of the tokens that it gives.
    """
    parts = _unpatched(model)
    if parts.adapter.vision_attention is None:
        raise UnsupportedModelError(f"{parts.adapter.family} has no [CLS] token in front of its visual tokens")
    found: list[Tensor] = []

    def observe(_: Any, given: Attended) -> None:
        found.append(received_in_tower(given.query, given.key, given.scaling).cpu())

    on = Installation()
    try:
        on.note(install_tap(parts.adapter.vision_attention(parts.base)[-1], observe))
        model(**inputs)
    finally:
        on.remove()
    return torch.cat(found)


def sinks(attention: Tensor, factor: float = 10.0) -> tuple[Tensor, Tensor]:
    """Which patches get more than `factor` times the mean of their picture, (B, N) bool, and their share, (B,)."""
    high = attention > factor * attention.mean(dim=1, keepdim=True)
    return high, (attention * high).sum(dim=1) / attention.sum(dim=1)


def _unpatched(model: Any) -> Parts:
    if is_applied(model):
        raise UnsupportedInputError("the model is patched: remove the patch first, to see what it attends to whole")
    return find_parts(model)


def _figure(x: str, y: str) -> tuple[Any, Any]:
    need("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
