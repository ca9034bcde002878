"""What a call shows: hooks from the vision encoder up to the language model, and the prompt as numbers on the host.

    before_model     labels, and how many of the last tokens generate() made: they do not ask
    before_base      the token ids, and features that came from outside
    around_encode    wraps the method that encodes images: only inside it is the projector this prompt's
    around_merge     where a method merges, perhaps before generate() and with a prompt that grows: notes where it puts
                     the features, by calling it again on features that tell their number

Pruning (`engine`) and training (`training.gate`) build on it. What stage 1 decides while images are encoded travels
with the feature tensors, as an attribute: through `generate`, beams, the caller's hands. dynamo does not look into the
hooks: it would trace the state of one forward once and for all, and silently.
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .compat import CANDIDATE_METHOD, PREPARE_METHOD, encoded_features
from .errors import ConfigError, UnsupportedInputError, UnsupportedModelError
from .install import Installation, owner
from .registry import ModalityPart, Parts

CHOSEN = "lp_patch_chosen"  # attribute of a feature tensor: what stage 1 decided of its rows
_BIT = -torch.inf  # by which numbered features tell their number


class Chosen(NamedTuple):
    """What stage 1 decided of one feature's N rows while it was encoded.

    Attributes:
        index: (R,) int64, ascending: the rows that were projected; None: all. The others hold NaN.
        scores: (N,) float, or None if the strategy has none. In training, the decisions.
    """

    index: Tensor | None
    scores: Tensor | None


@dataclass
class Encoding:
    """The images being encoded now.

    Attributes:
        arguments: of the encoding method, by name.
        sizes: rows of each image in each of the projector's rows, where these are not one image each.
        chosen: what stage 1 decided, image by image; `present` the rows that each had.
        attention: what the scorer reads in the encoder, (B, N) each.
        rows: (B, R) int64, the rows of the projector's input that it was given, of `shape` (B, N), or None for all.
    """

    arguments: dict[str, Any]
    sizes: list[int] | None = None
    chosen: list[Chosen] = field(default_factory=list)
    present: list[int] = field(default_factory=list)
    attention: dict[Any, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None
    shape: tuple[int, ...] = ()


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
class Call:
    """What one call shows before its language model runs; `started` says that it came through the merging module.

    Attributes:
        shows: whether it brings pictures.
        merged_outside: whether the caller has encoded pictures and gives embeddings that they may be merged into.
        ids: (B, S) token ids, or None; then `embeds` (B, S, D) are what the caller gave.
        features: (N, D) per visual input, by modality.
        visual: (B, S) bool, where a merging method put features.
        labels: (B, S), or None.
        generated: how many of the last tokens generate() made.
    """

    started: bool = False
    shows: bool = False
    merged_outside: bool = False
    encoding: Encoding | None = None
    ids: Tensor | None = None
    embeds: Tensor | None = None
    features: dict[str, list[Tensor]] = field(default_factory=dict)
    visual: Tensor | None = None
    labels: Tensor | None = None
    generated: int = 0


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


class PerThread(threading.local):
    """What one thread is showing to the model."""

    call: Call | None = None
    merged: Merged | None = None
    numbered: Tensor | None = None
    labels: Tensor | None = None
    generated: int = 0
    generating: bool = False
    width: int | None = None
    prepared: tuple[Any, int] = (None, 0)
    asking: Tensor | None = None
    showing: Any = None
    outside: bool = False


class State:
    """All that changes while hooks run; copied or pickled hooks start with none of it."""

    def __init__(self) -> None:
        self.local = PerThread()

    def __deepcopy__(self, memo: dict) -> "State":
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()


class Reader:
    """The hooks up to the language model. A subclass decides what happens to the features."""

    def __init__(self, parts: Parts, state: State) -> None:
        self.parts = parts
        self.state = state

    def install(self, on: Installation) -> None:
        """Put the hooks on the model."""
        base, model = self.parts.base, self.parts.model
        if any(isinstance(owner(hook), Reader) for hook in base._forward_pre_hooks.values()):
            raise ConfigError(
                "this model is patched, or in training: call lp_patch.remove(model), or remove() of its GatedModel"
            )
        if hasattr(model, "generate"):
            wrappers = {
                "generate": self.around_generate,
                CANDIDATE_METHOD: self.around_candidates,
                PREPARE_METHOD: self.around_prepare,
            }
            for name, wrapper in wrappers.items():
                if not hasattr(model, name):
                    raise UnsupportedModelError(
                        f"{type(model).__name__}.generate() has no {name}, by which lp_patch tells the prompt from what "
                        "was generated: this transformers is newer than lp_patch knows"
                    )
                on.wrap(model, name, wrapper)
        on.before(model, self.before_model)
        for modality in self.parts.modalities:
            on.wrap(base, modality.encode, partial(self.around_encode, modality.name))
        if self.parts.adapter.merge is not None:
            on.wrap(base, self.parts.adapter.merge, self.around_merge)
        on.before(base, self.before_base)
        if self.parts.adapter.merge is None:
            language, _, _ = self.parts.adapter.language_model.partition(".")
            for name, module in base.named_children():
                if name != language:
                    on.before(module, self.before_vision)

    def before_vision(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A part of the vision side runs: perhaps not through the method that encodes images."""
        if self._call().encoding is None:
            self.state.local.outside = True

    def _call(self) -> Call:
        """What this thread's call has shown so far."""
        local = self.state.local
        if local.call is None:
            local.call = Call()
        return local.call

    def take_call(self, embeds: Tensor | None) -> Call:
        """What led up to this forward of the language model on `embeds` (B, S, D)."""
        local = self.state.local
        call, local.call, local.outside = self._call(), None, False
        if embeds is not None and self.parts.adapter.merge is not None:
            self._recall(call, embeds)
        return call

    # ------------------------------------------------------------------ who asks

    def around_generate(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps generate(): only inside it is anything generated; an assistant may be the same model."""
        local = self.state.local
        before, local.generating, local.width = (local.generating, local.width), True, None
        try:
            return wrapped(*args, **kwargs)
        finally:
            local.generating, local.width = before

    def around_candidates(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps the start of assisted decoding, whose first forward shows the prompt and guesses after it."""
        ids = _arguments(wrapped, args, kwargs).get("input_ids")
        self.state.local.width = None if ids is None else ids.shape[1]
        return wrapped(*args, **kwargs)

    def around_prepare(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps what makes a forward's inputs: notes how many of the ids come after the prompt."""
        inputs, local = wrapped(*args, **kwargs), self.state.local
        ids, given = args[0] if args else kwargs.get("input_ids"), inputs.get("input_ids")
        if local.generating and ids is not None:
            local.width = ids.shape[1] if local.width is None else local.width
            if given is not None:
                local.prepared = (weakref.ref(given), ids.shape[1] - local.width)
        return inputs

    @torch.compiler.disable
    def before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Labels, and what generate() made: these tokens do not ask."""
        local = self.state.local
        local.labels = argument(module, "labels", args, kwargs)
        given, generated = local.prepared
        local.generated = generated if given is not None and given() is kwargs.get("input_ids") else 0
        local.prepared = (None, 0)

    @contextmanager
    def asking(self, mask: Tensor) -> Iterator[None]:
        """Within the block, only tokens where `mask` (B, S) bool says so ask in stage 2; for this thread."""
        local = self.state.local
        before, local.asking = local.asking, mask
        try:
            yield
        finally:
            local.asking = before

    def asking_of(self, call: Call, batch: int, length: int, seen: int) -> Tensor | None:
        """The mask of `asking` for a forward of `length` new tokens after `seen` ones: (B, length), or None."""
        mask = self.state.local.asking
        if mask is None:
            return None
        prompt = length - call.generated
        if mask.dim() != 2 or batch % len(mask) or mask.shape[1] not in (length, prompt, seen + prompt):
            raise UnsupportedInputError(
                f"patch.asking(mask): the mask must be (batch, tokens) of the prompt, ({batch}, {prompt}) here, got "
                f"{tuple(mask.shape)}"
            )
        mask = mask.bool().repeat_interleave(batch // len(mask), dim=0)  # beams
        own = mask[:, -min(mask.shape[1], length if mask.shape[1] == length else prompt) :]
        return nn.functional.pad(own, (0, length - own.shape[1]))

    # ------------------------------------------------------------------ images

    @torch.compiler.disable
    def around_encode(self, modality: str, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps the method that encodes images (or videos): only inside it does the projector prune."""
        if self.state.local.numbered is not None:
            return self.state.local.numbered
        call = self._call()
        if call.encoding is not None:
            return wrapped(*args, **kwargs)  # a method for videos that calls the one for images
        encoding = call.encoding = Encoding(_arguments(wrapped, args, kwargs))
        self.encoding_starts(encoding)
        try:
            output = wrapped(*args, **kwargs)
        finally:
            call.encoding = None
        features = encoded_features(output)
        if features is not None:
            found = call.features[modality] = list(features)
            if encoding.chosen and [x.shape[:-1].numel() for x in found] != encoding.present:
                raise UnsupportedInputError(
                    f"{self.parts.adapter.family}'s projector was given {encoding.present} tokens of images, its "
                    f"features have {[x.shape[:-1].numel() for x in found]}: its rows are not one image each, which "
                    "the adapter must say (`pictures`)"
                )
            for feature, chosen in zip(found, encoding.chosen, strict=False):
                setattr(feature, CHOSEN, chosen)
            if encoding.chosen and isinstance(features, Tensor) and hasattr(output, "pooler_output"):
                output.pooler_output = found  # rows of one tensor would lose what was chosen
        return output

    def encoding_starts(self, encoding: Encoding) -> None:
        """Images are about to be encoded: note which rows of the projector's input belong to which."""
        pictures = self.parts.adapter.pictures
        if self.parts.projector is not None and pictures is not None:
            encoding.sizes = pictures(self.parts.base, encoding.arguments)

    @torch.compiler.disable
    def around_merge(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps a method that merges: notes where the features of its images are in the embeddings it returns."""
        local = self.state.local
        call = self._call()
        call.features, local.merged = {}, None
        output = wrapped(*args, **kwargs)
        if not call.features:
            return output  # no images
        ((modality, features),) = call.features.items()
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

    def _recall(self, call: Call, embeds: Tensor) -> None:
        """Where these embeddings (B, S, D) are what the merging method returned, tell their visual positions."""
        call.features, merged = {}, self.state.local.merged
        if merged is None or embeds.shape[1:] != merged.embeds.shape[1:] or len(embeds) % len(merged.embeds):
            return
        times = len(embeds) // len(merged.embeds)  # beams, and several answers to one prompt
        again = merged.embeds.repeat_interleave(times, dim=0).to(embeds)
        if ((embeds == again) | (again != again)).all():  # rows of what was not projected hold NaN
            call.visual = (merged.numbers >= 0).repeat_interleave(times, dim=0)
            call.features = {merged.modality: [x for row in merged.features for x in row * times]}

    @torch.compiler.disable
    def before_base(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward starts: forget the last one, remember the prompt and features that come encoded."""
        local = self.state.local
        call = local.call = Call(started=True, labels=local.labels, generated=local.generated)
        local.labels, local.generated = None, 0
        call.ids = kwargs.get("input_ids", args[0] if args else None)
        call.embeds = kwargs.get("inputs_embeds")
        call.merged_outside = local.outside and call.embeds is not None
        call.shows = any(shows_images(name, kwargs[name]) for name in kwargs)
        for modality, output in (kwargs.get("mm_encoder_outputs") or {}).items():
            if output is not None:
                call.features[modality] = list(output.pooler_output)

    def placeholders(self, call: Call, token: int) -> Tensor:
        """(B, S) bool: positions that a visual feature replaces."""
        if call.visual is not None:
            return call.visual
        if call.ids is not None:
            return call.ids == token
        assert call.embeds is not None  # transformers refuses a call with neither
        embed = self.parts.language_model.get_input_embeddings()
        return (call.embeds == embed(torch.tensor(token, device=call.embeds.device))).all(dim=-1)

    def structural(self, embeds: Tensor, placeholders: Tensor) -> Tensor | None:
        """(B, S) bool among `placeholders`: line breaks in the merged embeddings (B, S, D); None: there are none."""
        structural = self.parts.adapter.structural
        return None if structural is None else placeholders & structural(self.parts.base, embeds)

    def read_prompt(
        self, call: Call, embeds: Tensor, mask: Tensor | None, asking: Tensor | None, kwargs: dict
    ) -> Prompt:
        """The prompt of a forward that shows images, on the host.

        This is the one wait for the device in a prefill.

        Args:
            embeds: (B, S, D), merged.
            mask: (B, S) of the caller's attention mask, or None if all are real.
            asking: (B, S) bool, or None.
            kwargs: of the language model's forward.
        """
        modalities = [m for m in self.parts.modalities if m.name in call.features]
        batch, length = embeds.shape[:2]
        device = embeds.device
        wanted: dict[str, Tensor] = {}
        if call.ids is not None and call.visual is None:
            wanted["ids"] = call.ids
        else:
            wanted.update({m.name: self.placeholders(call, m.placeholder) for m in modalities})
        if self.parts.adapter.structural is not None:
            found = [self.placeholders(call, m.placeholder).to(device) for m in modalities]
            wanted["structural"] = self.structural(embeds, torch.stack(found).any(dim=0))  # type: ignore[assignment]
        if mask is not None:
            wanted["real"] = mask
        ids = text_positions(kwargs, length)
        if ids is not None:
            wanted["positions"] = ids.expand(batch, length)
        if call.labels is not None:
            wanted["labels"] = call.labels
        if asking is not None:
            wanted["asking"] = asking
        # one transfer: labels may be negative, ids are far from the ends of int64
        stacked = torch.stack([x.to(device, torch.long) for x in wanted.values()]).cpu().numpy()
        host = dict(zip(wanted, stacked, strict=True))
        if "ids" in host:
            masks = [host["ids"] == m.placeholder for m in modalities]
        else:
            masks = [host[m.name] != 0 for m in modalities]
        real = host["real"] != 0 if mask is not None else np.ones((batch, length), dtype=bool)
        structural = host["structural"] != 0 if "structural" in host else np.zeros_like(real)
        jumps = None
        if ids is not None:
            jumps = np.pad(np.diff(host["positions"], axis=1) != 1, ((0, 0), (1, 0)))
            jumps[:, 1:] &= real[:, 1:] & real[:, :-1]
        asks = None
        if call.labels is not None:
            text = real & ~np.logical_or.reduce(masks)
            asks = host["labels"] == -100
            asks |= ~(asks & text).any(axis=1, keepdims=True)  # labels on everything mark no answer
        if call.generated:
            asks = np.ones_like(real) if asks is None else asks
            asks[:, -call.generated :] = False
        if asking is not None:
            asks = (host["asking"] != 0) & (True if asks is None else asks)
        return Prompt(modalities, masks, structural, real, jumps, asks, host.get("ids"))


def text_positions(kwargs: dict, length: int) -> Tensor | None:
    """(B or 1, S) position ids, in the axis that counts text; None where transformers looks for no packing in them."""
    ids = kwargs.get("position_ids")
    if ids is None or (ids.dim() == 3 and ids.shape[0] != 4):
        return None
    return ids[0] if ids.dim() == 3 else ids


def argument(module: nn.Module, name: str, args: tuple, kwargs: dict) -> Any:
    """An argument of a module's forward, by keyword or by position; None if it was not given."""
    if name in kwargs or not args:
        return kwargs.get(name)
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args, strict=False)).get(name)


def _arguments(method: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call, by name, those in **kwargs too."""
    bound = inspect.signature(method).bind(*args, **kwargs).arguments
    return {**bound, **bound.get("kwargs", {})}


def shows_images(name: str, value: Any) -> bool:
    """Whether an argument of a forward brings pictures, raw or encoded."""
    return value is not None and (name.startswith("pixel_values") or (name == "mm_encoder_outputs" and len(value) > 0))


def chosen_of(feature: Tensor) -> Chosen:
    """What stage 1 decided of a feature (N, D) while it was encoded; nothing for one from outside."""
    return getattr(feature, CHOSEN, None) or Chosen(None, None)


def number_features(features: Sequence[Tensor]) -> Tensor:
    """F features (N, D) -> (F, N, D) of rows that say, bit by bit after a first mark, which feature they belong to.

    Zeros and infinities pass through any dtype.
    """
    shown = torch.zeros_like(torch.stack(list(features)))
    shown[..., 0] = _BIT
    for bit in range(len(features).bit_length()):
        shown[[i for i in range(len(features)) if i >> bit & 1], :, 1 + bit] = _BIT
    return shown


def read_numbers(embeds: Tensor) -> Tensor:
    """(B, S, D) in which numbered features were merged -> (B, S) int64: a feature's number, -1 for text."""
    width = min(embeds.shape[-1] - 1, 62)
    bits = 2 ** torch.arange(width, device=embeds.device)
    numbers = ((embeds[..., 1 : 1 + width] == _BIT) * bits).sum(dim=-1)
    return numbers.masked_fill(embeds[..., 0] != _BIT, -1)


def _placed(feature: Tensor, count: int) -> Tensor:
    """The rows (count, D) of a feature (N, D) that are in the prompt: one that is cut at its end may lack some."""
    rows = feature[:count].detach()
    chosen = chosen_of(feature)
    if count < len(feature) and chosen.index is not None:
        chosen = Chosen(chosen.index[chosen.index < count], chosen.scores)
    setattr(rows, CHOSEN, Chosen(chosen.index, None if chosen.scores is None else chosen.scores[:count]))
    return rows


def _merged_embeds(output: Sequence[Any]) -> Tensor:
    """The merged embeddings (B, S, D) among what a merging method returns."""
    (embeds,) = [x for x in output if isinstance(x, Tensor) and x.dim() == 3]
    return embeds
