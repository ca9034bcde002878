"""What a prefill will do, decided on the host before anything is cut: lengths and places, in numpy, no model.

A visual input is an image or a video: what one budget is meant for. Its tokens replace placeholders of the prompt;
structural ones among them (line breaks of a tiling) carry no picture: they are kept like text and not counted. A
placeholder that the attention mask hides is not there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .budget import StageBudget
from .errors import UnsupportedInputError
from .prompt import Prompt


@dataclass(frozen=True)
class Feature:
    """One encoded feature of a call, as numbers.

    Attributes:
        rows: tokens that it has.
        left: those that stage 1 left while it was encoded, or None if nothing was chosen then.
        index: () -> (left,) int64: which; for features that the mask hides in part, a wait for the device.
    """

    rows: int
    left: int | None
    index: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Loss:
    """Tokens of a row among which stage 1 chooses, or has chosen.

    Attributes:
        positions: (n,) int64, ascending, where the tokens lie in the prompt.
        kept: how many of them stay.
        feature: the number of the feature that says which, among all of the call; None: not chosen yet.
        known: (kept,) int64, which, where that had to be read.
    """

    row: int
    positions: np.ndarray
    kept: int
    feature: int | None = None
    known: np.ndarray | None = None


@dataclass(frozen=True)
class VisualInput:
    """One image or video of one row.

    Attributes:
        positions: (n,) int64, ascending, where its counted tokens lie in the prompt.
        budget: tokens to keep after each stage.
        losses: where it loses tokens in stage 1.
    """

    row: int
    positions: np.ndarray
    budget: StageBudget
    losses: tuple[Loss, ...]

    @property
    def survivors(self) -> int:
        """Tokens left after stage 1."""
        return len(self.positions) + sum(x.kept - len(x.positions) for x in self.losses)


def find_inputs(
    prompt: Prompt,
    features: Sequence[Sequence[Feature]],
    merge_adjacent: bool | tuple[str, ...],
    budget: Callable[[int], StageBudget],
    split: Callable[[Tensor, Tensor], list[int]] | None = None,
) -> list[VisualInput]:
    """Cut the placeholders of each row into visual inputs.

    Args:
        features: per modality, in the order of the placeholders.
        merge_adjacent: whether features that follow one another without a token between are parts of one input, or of
            which modalities.
        budget: from the number of counted tokens, what to keep.
        split: (ids (S,), positions (n,) of a row's features) -> sizes of the inputs that they hold.
    """
    found: list[VisualInput] = []
    number = 0
    for modality, mask, own in zip(prompt.modalities, prompt.masks, features, strict=True):
        merge = merge_adjacent if isinstance(merge_adjacent, bool) else modality.name in merge_adjacent
        remaining = iter(own)
        for row in range(len(mask)):
            positions = mask[row].nonzero()[0]
            pieces: list[list[tuple[int, Feature, np.ndarray]]] = []
            while len(positions):
                feature = next(remaining, None)
                if feature is None or feature.rows > len(positions):
                    raise UnsupportedInputError(
                        f"image features of {[x.rows for x in own]} tokens do not fill the rows' "
                        f"{mask.sum(axis=1).tolist()} placeholders one by one"
                    )
                piece, positions = positions[: feature.rows], positions[feature.rows :]
                if feature.rows:  # a row without images may have an empty one
                    joined = split is not None or (merge and pieces and piece[0] == pieces[-1][-1][2][-1] + 1)
                    if pieces and joined:
                        pieces[-1].append((number, feature, piece))
                    else:
                        pieces.append([(number, feature, piece)])
                number += 1
            if split is not None and pieces:
                pieces = _split_pieces(prompt, row, pieces[0], split)
            found += [_visual_input(prompt, row, parts, budget) for parts in pieces]
        left = [x.rows for x in remaining if x.rows]
        if left:
            raise UnsupportedInputError(
                f"image features of {[x.rows for x in own]} tokens do not fill the rows' "
                f"{mask.sum(axis=1).tolist()} placeholders one by one: {left} are left over"
            )
    return found


def _split_pieces(
    prompt: Prompt, row: int, parts: list, split: Callable[[Tensor, Tensor], list[int]]
) -> list[list[tuple[int, Feature, np.ndarray]]]:
    """A row's features as the images that its token ids tell; without ids as one."""
    if prompt.ids is None:
        return [parts]
    positions = np.concatenate([piece for _, _, piece in parts])
    sizes = split(torch.from_numpy(prompt.ids[row]), torch.from_numpy(positions))
    none = Feature(0, None, lambda: np.zeros(0, dtype=np.int64))
    return [[(-1, none, piece)] for piece in np.split(positions, np.cumsum(sizes)[:-1])]


def _visual_input(
    prompt: Prompt, row: int, parts: list[tuple[int, Feature, np.ndarray]], budget: Callable[[int], StageBudget]
) -> VisualInput:
    """The visual input whose features are these, with what it loses."""
    here = prompt.real[row] & ~prompt.structural[row]
    positions = np.concatenate([piece for _, _, piece in parts])
    counted = positions[here[positions]]
    allowed = budget(len(counted))
    losses = []
    for number, feature, piece in parts:
        if feature.left is None:
            continue
        visible = here[piece]
        if visible.all():
            losses.append(Loss(row, piece, feature.left, number))
        elif visible.any():
            index = feature.index()
            known = (np.cumsum(visible) - 1)[index[visible[index]]]
            losses.append(Loss(row, piece[visible], len(known), number, known))
    if not losses and allowed.stage1 < len(counted):
        losses.append(Loss(row, counted, allowed.stage1))
    return VisualInput(row, counted, allowed, tuple(losses))


@dataclass(frozen=True)
class Plan:
    """Row-wise numbers of a prefill: no later step needs to wait for the device.

    Attributes:
        inputs: the visual inputs, row by row within a modality.
        visual: (B, S) bool, their counted tokens.
        kept: real tokens of each row after stage 1.
        survivors: visual ones among them.
        stage2: visual tokens that each row keeps in stage 2.
        wiped: whether the row loses its last visual tokens at `final_wipe_layer`.
        tail: last tokens of the input that are text in every row.
    """

    inputs: list[VisualInput]
    visual: np.ndarray
    kept: list[int]
    survivors: list[int]
    stage2: list[int]
    wiped: list[bool]
    tail: int

    @property
    def text(self) -> list[int]:
        """Tokens of each row that are not visual."""
        return [kept - survivors for kept, survivors in zip(self.kept, self.survivors, strict=True)]

    @property
    def losses(self) -> list[Loss]:
        """Where stage 1 removes tokens."""
        return [loss for x in self.inputs for loss in x.losses]

    @property
    def cuts(self) -> bool:
        """Whether stage 2 removes anything."""
        return self.stage2 != self.survivors

    @property
    def nothing(self) -> bool:
        """Whether every token stays in every layer: then nothing may be refused either."""
        return not self.losses and not self.cuts and not any(self.wiped)


def make_plan(inputs: Sequence[VisualInput], prompt: Prompt, wipes: bool) -> Plan:
    """Sum the budgets of each row's inputs; `wipes`: rows below full budget lose their visual tokens in the end."""
    rows = range(len(prompt.real))
    visual = np.zeros_like(prompt.real)
    for x in inputs:
        visual[x.row, x.positions] = True
    own = [[x for x in inputs if x.row == row] for row in rows]
    survivors = [sum(x.survivors for x in row) for row in own]
    text = prompt.real & ~visual
    return Plan(
        inputs=list(inputs),
        visual=visual,
        kept=[int(t) + s for t, s in zip(text.sum(axis=1), survivors, strict=True)],
        survivors=survivors,
        # features chosen under another budget may have left less than this one allows
        stage2=[min(sum(x.budget.stage2 for x in row), s) for row, s in zip(own, survivors, strict=True)],
        wiped=[wipes and any(x.budget.stage2 < len(x.positions) for x in row) for row in own],
        tail=int(np.cumprod(text[:, ::-1], axis=1).sum(axis=1).min()),
    )


@dataclass(frozen=True)
class Places:
    """Where the tokens that stage 1 leaves come from, as far as the host knows.

    Attributes:
        base: (B, N) int64: positions in the input, of padding -1; those of chosen tokens are filled in.
        holes: (T,) int64 into the flat `base`, for the chosen tokens, loss by loss.
        offsets: (T,) int64, what turns a chosen token's number into a place in `positions`.
        positions: (P,) int64, the positions of all losses, one after the other.
    """

    base: np.ndarray
    holes: np.ndarray
    offsets: np.ndarray
    positions: np.ndarray


def find_places(plan: Plan, prompt: Prompt) -> Places:
    """Lay out the rows after stage 1. Shorter ones are padded on the left."""
    length = max(1, *plan.kept)
    fixed = prompt.real.copy()
    for loss in plan.losses:
        fixed[loss.row, loss.positions] = False
    base = np.full((len(fixed), length), -1, dtype=np.int64)
    ends = []  # of the chosen tokens, which the device will put in order
    for row, keep in enumerate(fixed):
        own = keep.nonzero()[0]
        base[row, length - len(own) :] = own
        ends.append((row + 1) * length - len(own))
    holes = []
    for loss in plan.losses:
        ends[loss.row] -= loss.kept
        holes.append(np.arange(ends[loss.row], ends[loss.row] + loss.kept))
    starts = np.cumsum([0, *(len(loss.positions) for loss in plan.losses)])[:-1]
    return Places(
        base=base,
        holes=np.concatenate(holes) if holes else np.zeros(0, dtype=np.int64),
        offsets=np.repeat(starts, [loss.kept for loss in plan.losses]).astype(np.int64),
        positions=np.concatenate([loss.positions for loss in plan.losses]) if holes else np.zeros(0, dtype=np.int64),
    )


def asking_tokens(prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    """(B, S) bool each: the text that may ask, and the placeholders that the mask does not hide."""
    placeholders = prompt.placeholders & prompt.real
    text = prompt.real & ~placeholders
    return (text if prompt.asks is None else text & prompt.asks), placeholders


def query_weights(
    weigh: Callable[[Tensor, Tensor, Tensor], Tensor], plan: Plan, prompt: Prompt, named: bool
) -> np.ndarray:
    """How much each of the input's tokens asks in stage 2: (B, S) float32, zero in rows without visual tokens.

    Args:
        weigh: of the text scorer.
        named: whether the caller said who may ask: then somebody must.
    """
    asks, placeholders = asking_tokens(prompt)
    after = placeholders[:, ::-1].cumsum(axis=1)[:, ::-1] == 0
    mute = ~(asks & after).any(axis=1) & (np.array(plan.survivors) > np.array(plan.stage2))
    if named and mute.any():
        raise UnsupportedInputError(
            f"patch.asking(mask): in row {int(mute.argmax())} no token that may ask stands after the last visual token:"
            " mark some there, or leave asking out"
        )
    # without text after its images a row asks with its last token before what does not ask
    weights = weigh(*(torch.from_numpy(x) for x in (asks, placeholders, prompt.real))).numpy()
    return np.where(plan.visual.any(axis=1, keepdims=True), weights, 0.0).astype(np.float32)


def query_slots(weights: np.ndarray, prompt: Prompt, length: int) -> np.ndarray | None:
    """The weights (B, S) as those of the last Q slots of rows of `length` tokens after stage 1: (B, Q) float32.

    Nothing that follows a row's last placeholder is ever removed, so these tokens' slots are known, and so is that of
    the last token left before them. None: another token asks.
    """
    placeholders = prompt.placeholders & prompt.real
    end = placeholders.shape[1]
    last = np.where(placeholders.any(axis=1), end - 1 - placeholders[:, ::-1].argmax(axis=1), 0)
    rows, at = weights.nonzero()
    if (at < last[rows]).any():
        return None
    following = prompt.real[:, ::-1].cumsum(axis=1)[:, ::-1] - prompt.real  # real tokens after each
    back = following[rows, at]
    count = min(length, int(back.max(initial=0)) + 1)
    slots = np.zeros((len(weights), count), dtype=np.float32)
    slots[rows, count - 1 - back] = weights[rows, at]
    return slots


class Planned(NamedTuple):
    """All that a prefill's host part comes to.

    Attributes:
        flat: (B, seen + S), the caller's mask, on its device, or None if all are real.
        places: None where nothing is removed.
        weights: (B, S) float32, how much each token asks, or None where stage 2 removes nothing.
    """

    flat: Tensor | None
    prompt: Prompt
    plan: Plan
    places: Places | None
    weights: np.ndarray | None
