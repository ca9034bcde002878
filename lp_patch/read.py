"""What a call shows: hooks from the vision encoder up to the language model.

    before_base      the token ids, and features that came from outside
    around_encode    wraps the method that encodes images: only inside it is the projector this prompt's
    around_merge     where a method merges, perhaps before generate() and with a prompt that grows: notes where it puts
                     the features, by calling it again on features that tell their number

Pruning (`engine`) and training (`training.gate`) build on it. What stage 1 decides while images are encoded travels
with the feature tensors, as an attribute: through `generate`, beams, the caller's hands. dynamo does not look into the
hooks: it would trace the state of one forward once and for all, and silently.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .asking import Asking, arguments_of
from .compat import encoded_features
from .errors import ConfigError, UnsupportedInputError
from .install import Installation, owner
from .registry import Parts
from .trace import Encoded

CHOSEN = "lp_patch_chosen"  # attribute of a feature tensor: what stage 1 decided of its rows
ENCODED = "lp_patch_encoded"  # of the first feature of a call: what its encoding ran on
RAW = {"pixel_values": "image", "pixel_values_videos": "video"}
_BIT = -torch.inf  # by which numbered features tell their number


class Chosen(NamedTuple):
    """What stage 1 decided of one feature's N rows while it was encoded.

    Attributes:
        rows: (R,) int64, ascending: those that were projected; None: all. The others hold NaN.
        scores: (N,) float, or None if the strategy has none. In training, the decisions.
        weights: (R, N) float32, of what the tokens that stand at `rows` are mixtures; None: they are as they were.
    """

    rows: Tensor | None
    scores: Tensor | None
    weights: Tensor | None = None


@dataclass
class Encoding:
    """The images being encoded now.

    Attributes:
        arguments: of the encoding method, by name.
        sizes: rows of each image in each of the projector's rows, where these are not one image each.
        chosen: what stage 1 decided, image by image; `present` the rows that each had.
        attention: what the scorer reads in the encoder, (B, N) or (B, N, C) each.
        towers: rows that the vision tower was given, and tokens of each.
        rows: (B, R) int64, the rows of the projector's input that it was given, of `shape` (B, N), or None for all.
    """

    arguments: dict[str, Any]
    sizes: list[int] | None = None
    chosen: list[Chosen] = field(default_factory=list)
    present: list[int] = field(default_factory=list)
    attention: dict[Any, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None
    shape: tuple[int, ...] = ()
    towers: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Merged:
    """What a merging method returned.

    Attributes:
        embeds: (B, S, D), by which the forward that is given them knows them again.
        numbers: (B, S) int64, the feature that stands there, -1 for text.
        modality: of the features.
        features: the rows in the prompt of each feature, row by row in the prompt's order.
        labels: (B, S), or None if none were given.
    """

    embeds: Tensor
    numbers: Tensor
    modality: str
    features: list[list[Tensor]]
    labels: Tensor | None


@dataclass
class Call:
    """What one call shows before its language model runs; `started` says that it came through the merging module.

    Attributes:
        shows: whether it brings pictures; `brings`: the modalities that it brings raw.
        merged_outside: whether the caller has encoded pictures and gives embeddings that they may be merged into.
        ids: (B, S) token ids, or None; then `embeds` (B, S, D) are what the caller gave.
        features: (N, D) per visual input, by modality.
        visual: (B, S) bool, where a merging method put features.
        labels: (B, S), or None.
        generated: how many of the last tokens generate() made.
        expected: in how many ways it brings pictures.
        given: the attention mask that the caller gave.
        read_mask: the one that `host` was read with.
        host: what was read of it, and `planned` what is to be done, where both were possible before the images are
            merged.
    """

    started: bool = False
    shows: bool = False
    brings: frozenset[str] = frozenset()
    merged_outside: bool = False
    encoding: Encoding | None = None
    ids: Tensor | None = None
    embeds: Tensor | None = None
    features: dict[str, list[Tensor]] = field(default_factory=dict)
    visual: Tensor | None = None
    labels: Tensor | None = None
    generated: int = 0
    expected: int = 0
    given: Any = None
    read_mask: Any = None
    host: Any = None
    planned: Any = None

    def mask_for(self, handed: Any) -> Any:
        """The mask to read padding from, where the language model was handed this one.

        Some merging modules make masks by layer from the caller's (B, tokens).
        """
        return self.given if is_made(handed) and not is_made(self.given) and self.started else handed


def is_made(mask: Any) -> bool:
    """Whether a mask says of each query what it sees, (B, heads, queries, keys), perhaps by the kind of a layer."""
    return isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() == 4)


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
    encoded: Encoding | None = None
    outside: bool = False


class State:
    """All that changes while hooks run; copied or pickled hooks start with none of it."""

    def __init__(self) -> None:
        self.local = PerThread()

    def __deepcopy__(self, memo: dict) -> "State":
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()


class Reader(Asking):
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
        self.install_asking(on, model)
        for method in dict.fromkeys(m.encode for m in self.parts.modalities):
            names = tuple(m.name for m in self.parts.modalities if m.encode == method)
            on.wrap(base, method, partial(self.around_encode, names))
        if self.parts.adapter.merge is not None:
            on.wrap(base, self.parts.adapter.merge, self.around_merge)
        on.before(base, self.before_base)
        tower = None if self.parts.adapter.tower is None else self.parts.adapter.tower(base)
        if tower is not None:
            on.note(tower.register_forward_hook(self.after_tower).remove)
        if self.parts.adapter.merge is None:
            language, _, _ = self.parts.adapter.language_model.partition(".")
            for name, module in base.named_children():
                if name != language:
                    on.before(module, self.before_vision)

    def before_vision(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A part of the vision side runs: perhaps not through the method that encodes images."""
        if self._call().encoding is None:
            self.state.local.outside = True

    def after_tower(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The vision tower has run on so many rows of so many tokens."""
        encoding, states = self._call().encoding, getattr(output, "last_hidden_state", None)
        if encoding is not None and isinstance(states, Tensor) and states.dim() == 3:
            encoding.towers.append((states.shape[0], states.shape[1]))

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

    @torch.compiler.disable
    def around_encode(self, names: tuple[str, ...], wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps the method that encodes images (or videos): only inside it does the projector prune."""
        if self.state.local.numbered is not None:
            return self.state.local.numbered
        call = self._call()
        # a method of several modalities encodes those that the call brings, one after the other
        modality = next((n for n in names if n in call.brings and n not in call.features), names[0])
        if call.encoding is not None:
            return wrapped(*args, **kwargs)  # a method for videos that calls the one for images
        if not call.started:
            self.state.local.outside = True  # by the caller, or by generate(), which passes the features on
        encoding = call.encoding = Encoding(arguments_of(wrapped, args, kwargs))
        self.encoding_starts(encoding)
        try:
            output = self.encode(encoding, wrapped, args, kwargs)
        finally:
            call.encoding = None
        features = encoded_features(output)
        if features is not None:
            found = call.features[modality] = list(features)
            rows = [x.shape[:-1].numel() for x in found]
            if encoding.chosen and rows != encoding.present:
                raise UnsupportedInputError(
                    f"{self.parts.adapter.family}'s projector was given {encoding.present} tokens of images, its "
                    f"features have {rows}: its rows are not one image each, which "
                    "the adapter must say (`pictures`)"
                )
            for feature, chosen in zip(found, encoding.chosen, strict=False):
                setattr(feature, CHOSEN, chosen)
            if encoding.chosen and isinstance(features, Tensor):
                setattr(features, CHOSEN, encoding.chosen)
            self.state.local.encoded = encoding
            if found:
                setattr(found[0], ENCODED, self._ran(encoding))
            self.encoded(call)
        return output

    def encoded(self, call: Call) -> None:
        """Images of this call have been encoded."""

    def _ran(self, encoding: Encoding) -> list[Encoded]:
        """What the vision tower and the projector ran on, where the family says how to count it."""
        early = self.parts.projector is not None
        present = sum(encoding.present) if early else None
        ran = present if encoding.rows is None else encoding.rows.numel()
        return [
            Encoded(rows, tokens, *((ran, present) if number == 0 else ()))
            for number, (rows, tokens) in enumerate(encoding.towers)
        ]

    def encode(self, encoding: Encoding, wrapped: Callable, args: tuple, kwargs: dict) -> Any:
        """Call the method that encodes."""
        return wrapped(*args, **kwargs)

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
        given = arguments_of(wrapped, args, kwargs)
        ids = given["input_ids"]
        (token,) = [m.placeholder for m in self.parts.modalities if m.name == modality]
        placed = [row[row >= 0].unique_consecutive(return_counts=True) for row in numbers.cpu()]
        for (which, _), expected in zip(placed, (ids == token).sum(dim=1).tolist(), strict=True):
            if len(which) > expected:
                raise UnsupportedInputError(
                    f"a prompt with {expected} images was given {len(which)} tiles, which {self.parts.adapter.family} "
                    "merges without their bounds: give one tile per image, or remove the patch"
                )
        rows = [[_placed(features[i], n) for i, n in zip(*map(Tensor.tolist, x), strict=True)] for x in placed]
        grown = [x for x in output if isinstance(x, Tensor) and x.dim() == 2]
        labels = None if given.get("labels") is None else grown[-1]
        local.merged = Merged(_merged_embeds(output).detach(), numbers, modality, rows, labels)
        return output

    def _recall(self, call: Call, embeds: Tensor) -> None:
        """Where these embeddings (B, S, D) are what the merging method returned, tell their visual positions."""
        call.features, call.labels, merged = {}, None, self.state.local.merged
        if merged is None or embeds.shape[1:] != merged.embeds.shape[1:] or len(embeds) % len(merged.embeds):
            return
        times = len(embeds) // len(merged.embeds)  # beams, and several answers to one prompt
        again = merged.embeds.repeat_interleave(times, dim=0).to(embeds)
        if ((embeds == again) | (again != again)).all():  # rows of what was not projected hold NaN
            call.visual = (merged.numbers >= 0).repeat_interleave(times, dim=0)
            call.features = {merged.modality: [x for row in merged.features for x in row * times]}
            call.labels = merged.labels if times == 1 else None

    @torch.compiler.disable
    def before_base(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward starts: forget the last one, remember the prompt and features that come encoded."""
        local = self.state.local
        call = local.call = Call(started=True, labels=local.labels, generated=local.generated)
        local.labels, local.generated = None, 0
        call.ids = kwargs.get("input_ids", args[0] if args else None)
        call.embeds = kwargs.get("inputs_embeds")
        call.given = kwargs.get("attention_mask")
        call.merged_outside = local.outside and call.embeds is not None and self.parts.adapter.merge is None
        call.shows = any(shows_images(name, kwargs[name]) for name in kwargs)
        call.brings = frozenset(m for name, m in RAW.items() if kwargs.get(name) is not None)
        for modality, output in (kwargs.get("mm_encoder_outputs") or {}).items():
            if output is not None:
                call.features[modality] = self._given(output.pooler_output)

    def _given(self, features: Any) -> list[Tensor]:
        """Features (N, D) that come encoded; where what was chosen got lost on the way, their rows of NaN tell it.

        generate() stacks those of one tensor anew for beams, and callers copy: no wait for features as they came.
        """
        found = list(features)
        for feature, chosen in zip(found, getattr(features, CHOSEN, ()), strict=False):
            setattr(feature, CHOSEN, chosen)
        encoding = self.state.local.encoded
        lost = [x for x in found if not hasattr(x, CHOSEN)]
        if encoding is None or not encoding.chosen or not lost:
            return found
        pairs = zip(encoding.present, encoding.chosen, strict=True)
        known = {(n, tuple(c.rows.tolist())): c for n, c in pairs if c.rows is not None}
        for feature in lost:
            left = (~feature.isnan().all(dim=-1)).nonzero().flatten().tolist()
            chosen = known.get((len(feature), tuple(left)))
            if chosen is not None:
                setattr(feature, CHOSEN, chosen)
        return found

    def placeholders(self, call: Call, token: int) -> Tensor:
        """(B, S) bool: positions that a visual feature replaces."""
        if call.visual is not None:
            return call.visual
        if call.ids is not None:
            return call.ids == token
        assert call.embeds is not None  # transformers refuses a call with neither
        embed = self.parts.language_model.get_input_embeddings()
        return (call.embeds == embed(torch.full((), token, device=call.embeds.device))).all(dim=-1)

    def structural(self, embeds: Tensor, placeholders: Tensor) -> Tensor | None:
        """(B, S) bool among `placeholders`: line breaks in the merged embeddings (B, S, D); None: there are none."""
        structural = self.parts.adapter.structural
        return None if structural is None else placeholders & structural(self.parts.base, embeds)


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
    if count < len(feature) and chosen.rows is not None:
        there = chosen.rows < count
        weights = None if chosen.weights is None else chosen.weights[there]
        chosen = Chosen(chosen.rows[there], chosen.scores, weights)
    scores = None if chosen.scores is None else chosen.scores[:count]
    setattr(rows, CHOSEN, chosen._replace(scores=scores))
    return rows


def _merged_embeds(output: Sequence[Any]) -> Tensor:
    """The merged embeddings (B, S, D) among what a merging method returns."""
    (embeds,) = [x for x in output if isinstance(x, Tensor) and x.dim() == 3]
    return embeds
