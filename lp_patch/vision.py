"""What a forward shows: hooks from the vision encoder up to the language model, which tell where features stand.

    around_encode    wraps the method that encodes images: only inside it is the projector this prompt's
    around_merge     where a method merges, perhaps before generate() and with a prompt that grows: notes where it puts
                     the features, by calling it again on features that tell their number
    before_base      remembers the prompt, and features that came from outside

Pruning (`surgery`) and training (`training.gate`) build on it. dynamo does not look into the hooks: it would trace the
state of one forward once and for all, and silently.
"""

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .compat import encoded_features
from .errors import ConfigError, UnsupportedInputError
from .install import Installation, owner
from .registry import ModalityPart, Parts

REMOVED = -torch.inf  # a feature row of this value was removed by stage 1
FEATURE_SCORES = "lp_patch_scores"  # attribute of a feature tensor: what stage 1 thinks of its tokens


@dataclass
class Encoding:
    """Stage 1 of the images being encoded now; `attention` has what the scorer reads in the encoder, (B, N) each."""

    scores: list[Tensor | None] = field(default_factory=list)
    attention: dict[Any, Tensor] = field(default_factory=dict)
    index: Tensor | None = None
    present: int = 0


@dataclass(frozen=True)
class Merged:
    """What a merging method returned.

    Attributes:
        embeds: (B, S, D), by which the forward that is given them knows them again.
        numbers: (B, S) int64, the feature that stands there, -1 for text.
        modality: of the features.
        features: the rows in the prompt of each feature, row by row in the prompt's order.
    """

    embeds: Tensor
    numbers: Tensor
    modality: str
    features: list[list[Tensor]]


@dataclass
class Shown:
    """What one call shows before its language model runs; `started` says that it came through the merging module."""

    started: bool = False
    shown: bool = False
    encoding: Encoding | None = None
    ids: Tensor | None = None
    embeds: Tensor | None = None
    features: dict[str, list[Tensor]] = field(default_factory=dict)
    visual: Tensor | None = None


class Prompt(NamedTuple):
    """Where visual tokens stand in a prompt.

    Attributes:
        modalities: those shown, and for each in `masks` (B, S) bool its placeholders.
        visual: (B, S) bool, counted visual tokens.
        structural: (B, S) bool, line breaks of a tiling: no picture, kept and not counted.
    """

    modalities: list[ModalityPart]
    masks: list[Tensor]
    visual: Tensor
    structural: Tensor


class PerThread(threading.local):
    """What one thread is showing to the model."""

    shown: Shown | None = None
    merged: Merged | None = None
    numbered: Tensor | None = None


class State:
    """All that changes while hooks run; copied or pickled hooks start with none of it."""

    def __init__(self) -> None:
        self.local = PerThread()

    def __deepcopy__(self, memo: dict) -> "State":
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()


class Vision:
    """The hooks up to the language model. A subclass decides what happens to the features."""

    def __init__(self, parts: Parts, state: State) -> None:
        self.parts = parts
        self.state = state

    def install(self, on: Installation) -> None:
        """Put the hooks on the model."""
        base = self.parts.base
        if any(isinstance(owner(hook), Vision) for hook in base._forward_pre_hooks.values()):
            raise ConfigError(
                "this model is patched, or in training: call lp_patch.remove(model), or remove() of its GatedModel"
            )
        for modality in self.parts.modalities:
            on.wrap(base, modality.encode, partial(self.around_encode, modality.name))
        if self.parts.adapter.merge is not None:
            on.wrap(base, self.parts.adapter.merge, self.around_merge)
        on.before(base, self.before_base)

    def _shown(self) -> Shown:
        """What this thread's call has shown so far."""
        local = self.state.local
        if local.shown is None:
            local.shown = Shown()
        return local.shown

    def _take_shown(self, embeds: Tensor | None) -> Shown:
        """What led up to this forward of the language model on `embeds` (B, S, D)."""
        shown, self.state.local.shown = self._shown(), None
        if embeds is not None and self.parts.adapter.merge is not None:
            self._recall(shown, embeds)
        return shown

    @torch.compiler.disable
    def around_encode(self, modality: str, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps the method that encodes images (or videos): only inside it does the projector prune."""
        if self.state.local.numbered is not None:
            return self.state.local.numbered
        shown = self._shown()
        if shown.encoding is not None:
            return wrapped(*args, **kwargs)  # a method for videos that calls the one for images
        encoding = shown.encoding = Encoding()
        try:
            output = wrapped(*args, **kwargs)
        finally:
            shown.encoding = None
        features = encoded_features(output)
        if features is not None:
            shown.features[modality] = list(features)
            for feature, scores in zip(shown.features[modality], encoding.scores, strict=False):
                setattr(feature, FEATURE_SCORES, scores)
        return output

    @torch.compiler.disable
    def around_merge(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps a method that merges: notes where the features of its images are in the embeddings it returns."""
        local = self.state.local
        shown = self._shown()
        shown.features, local.merged = {}, None
        output = wrapped(*args, **kwargs)
        if not shown.features:
            return output  # no images
        ((modality, features),) = shown.features.items()
        local.numbered = number_features(features)
        try:
            with torch.no_grad():
                numbers = read_numbers(_merged_embeds(wrapped(*args, **kwargs)))
        finally:
            local.numbered = None
        ids = inspect.signature(wrapped).bind(*args, **kwargs).arguments["input_ids"]
        (token,) = [m.placeholder for m in self.parts.modalities if m.name == modality]
        placed = [row[row >= 0].unique_consecutive(return_counts=True) for row in numbers.cpu()]
        for (which, _), expected in zip(placed, (ids == token).sum(dim=1).tolist(), strict=True):
            if len(which) > expected:
                raise UnsupportedInputError(
                    f"a prompt with {expected} images was given {len(which)} tiles, which {self.parts.adapter.family} "
                    "merges without their bounds: give one tile per image, or remove the patch"
                )
        rows = [[_placed(features[i], n) for i, n in zip(*map(Tensor.tolist, x), strict=True)] for x in placed]
        local.merged = Merged(_merged_embeds(output).detach(), numbers, modality, rows)
        return output

    def _recall(self, shown: Shown, embeds: Tensor) -> None:
        """Where these embeddings (B, S, D) are what the merging method returned, tell their visual positions."""
        shown.features, merged = {}, self.state.local.merged
        if merged is None or embeds.shape[1:] != merged.embeds.shape[1:] or len(embeds) % len(merged.embeds):
            return
        times = len(embeds) // len(merged.embeds)  # beams, and several answers to one prompt
        if torch.equal(embeds, merged.embeds.repeat_interleave(times, dim=0).to(embeds)):
            shown.visual = (merged.numbers >= 0).repeat_interleave(times, dim=0)
            shown.features = {merged.modality: [x for row in merged.features for x in row * times]}

    @torch.compiler.disable
    def before_base(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward starts: forget the last one, remember the prompt and features that come encoded."""
        shown = self.state.local.shown = Shown(started=True)
        shown.ids = kwargs.get("input_ids", args[0] if args else None)
        shown.embeds = kwargs.get("inputs_embeds")
        shown.shown = any(shows_images(name, kwargs[name]) for name in kwargs)
        for modality, output in (kwargs.get("mm_encoder_outputs") or {}).items():
            if output is not None:
                shown.features[modality] = list(output.pooler_output)

    def _placeholders(self, shown: Shown, token: int) -> Tensor:
        """(B, S) bool: positions that a visual feature replaces."""
        if shown.visual is not None:
            return shown.visual
        if shown.ids is not None:
            return shown.ids == token
        assert shown.embeds is not None  # transformers refuses a call with neither
        embed = self.parts.language_model.get_input_embeddings()
        return (shown.embeds == embed(torch.tensor(token, device=shown.embeds.device))).all(dim=-1)

    def _prompt(self, shown: Shown, embeds: Tensor, real: Tensor) -> Prompt:
        """Where the features stand in embeds (B, S, D); `real` (B, S) bool excludes padding."""
        modalities = [m for m in self.parts.modalities if m.name in shown.features]
        masks = [self._placeholders(shown, m.placeholder).to(real.device) & real for m in modalities]
        visual = torch.stack(masks).any(dim=0)
        structural = torch.zeros_like(visual)
        if self.parts.adapter.structural is not None:
            structural = visual & self.parts.adapter.structural(self.parts.base, embeds)
        return Prompt(modalities, masks, visual & ~structural, structural)


def shows_images(name: str, value: Any) -> bool:
    """Whether an argument of a forward brings pictures, raw or encoded."""
    return value is not None and (name.startswith("pixel_values") or (name == "mm_encoder_outputs" and len(value) > 0))


def is_removed(features: Tensor) -> Tensor:
    """Rows that stage 1 marked: (..., D) -> (...) bool. A mark fills its row, so one column tells."""
    return features[..., 0] == REMOVED


def number_features(features: Sequence[Tensor]) -> Tensor:
    """F features (N, D) -> (F, N, D) of rows that say, bit by bit after a first mark, which feature they belong to.

    Zeros and infinities pass through any dtype.
    """
    shown = torch.zeros_like(torch.stack(list(features)))
    shown[..., 0] = REMOVED
    for bit in range(len(features).bit_length()):
        shown[[i for i in range(len(features)) if i >> bit & 1], :, 1 + bit] = REMOVED
    return shown


def read_numbers(embeds: Tensor) -> Tensor:
    """(B, S, D) in which numbered features were merged -> (B, S) int64: a feature's number, -1 for text."""
    width = min(embeds.shape[-1] - 1, 62)
    bits = 2 ** torch.arange(width, device=embeds.device)
    numbers = ((embeds[..., 1 : 1 + width] == REMOVED) * bits).sum(dim=-1)
    return numbers.masked_fill(~is_removed(embeds), -1)


def _placed(feature: Tensor, count: int) -> Tensor:
    """The rows (count, D) of a feature (N, D) that are in the prompt: one that is cut at its end may lack some."""
    rows = feature[:count].detach()
    if count == len(feature):
        setattr(rows, FEATURE_SCORES, getattr(feature, FEATURE_SCORES, None))
    return rows


def _merged_embeds(output: Sequence[Any]) -> Tensor:
    """The merged embeddings (B, S, D) among what a merging method returns."""
    (embeds,) = [x for x in output if isinstance(x, Tensor) and x.dim() == 3]
    return embeds
