"""Where the visual inputs of a prompt lie, and how many tokens each row keeps: host-side bookkeeping, no model.

A visual input is an image or a video: what one budget is meant for. Its tokens replace placeholders of the prompt;
structural ones among them (line breaks of a tiling) carry no picture: they are kept like text and not counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import StageBudget
from .errors import UnsupportedInputError


@dataclass(frozen=True)
class VisualInput:
    """One image or video of one row.

    Attributes:
        row: its row in the batch.
        positions: (n,) int64 on the host, ascending, where its counted tokens lie in the prompt.
        budget: tokens to keep after each stage.
        removed: how many of its tokens were gone when the prompt was assembled.
    """

    row: int
    positions: Tensor
    budget: StageBudget
    removed: int

    @property
    def present(self) -> int:
        """Counted tokens in the prompt."""
        return len(self.positions)

    @property
    def pending(self) -> bool:
        """Whether stage 1 is still to be done."""
        return self.removed == 0 and self.budget.stage1 < self.present

    @property
    def survivors(self) -> int:
        """Tokens left after stage 1."""
        return self.budget.stage1 if self.pending else self.present - self.removed


def find_inputs(
    masks: Sequence[Tensor],
    sizes: Sequence[Sequence[int]],
    structural: Tensor,
    removed: Tensor,
    merge_adjacent: Sequence[bool],
    budget: Callable[[int], StageBudget],
    split: Callable[[int, Tensor], list[int]] | None = None,
) -> list[VisualInput]:
    """Cut the placeholders of each row into visual inputs.

    Args:
        masks: per modality (B, S) bool on the host, its placeholders.
        sizes: per modality the token numbers of its encoded features, in the order of the placeholders.
        structural: (B, S) bool on the host.
        removed: (B, S) bool on the host.
        merge_adjacent: per modality, whether features that follow one another without a token between are parts of one
            input.
        budget: from the number of counted tokens, what to keep.
        split: (row, positions (n,) of one feature's tokens) -> sizes of the inputs that this feature holds.
    """
    found: list[VisualInput] = []
    for mask, lengths, merge in zip(masks, sizes, merge_adjacent, strict=True):
        remaining = iter(lengths)
        for row in range(mask.shape[0]):
            positions = mask[row].nonzero().squeeze(1)
            pieces: list[Tensor] = []
            while len(positions) > 0:
                size = next(remaining, None)
                if size is None or size > len(positions):
                    raise UnsupportedInputError(
                        f"image features of {list(lengths)} tokens do not fill the rows' {mask.sum(dim=1).tolist()} "
                        "placeholders one by one"
                    )
                piece, positions = positions[:size], positions[size:]
                if size == 0:
                    continue  # a row without images
                if split is not None:
                    pieces += piece.split(split(row, piece))
                elif merge and pieces and piece[0] == pieces[-1][-1] + 1:
                    pieces[-1] = torch.cat([pieces[-1], piece])
                else:
                    pieces.append(piece)
            for piece in pieces:
                counted = piece[~structural[row, piece]]
                gone = int(removed[row, counted].sum())
                found.append(VisualInput(row, counted, budget(len(counted)), gone))
    return found


@dataclass(frozen=True)
class Plan:
    """Row-wise numbers of a prefill: no later stage needs to wait for the device.

    Attributes:
        kept: real tokens of each row after stage 1.
        survivors: visual ones among them.
        stage2: visual tokens that each row keeps in stage 2.
        wiped: whether the row loses its last visual tokens at `final_wipe_layer`.
        tail: last tokens of the input that are text in every row.
    """

    kept: list[int]
    survivors: list[int]
    stage2: list[int]
    wiped: list[bool]
    tail: int

    @property
    def text(self) -> list[int]:
        """Tokens of each row that are not visual."""
        return [kept - survivors for kept, survivors in zip(self.kept, self.survivors, strict=True)]


def make_plan(inputs: Sequence[VisualInput], real: Tensor, visual: Tensor, wipes: bool) -> Plan:
    """Sum the budgets of each row's inputs.

    Args:
        inputs: of all rows.
        real: (B, S) bool on the host, tokens that are not padding.
        visual: (B, S) bool on the host, counted visual tokens.
        wipes: whether there is a layer from which on visual tokens vanish; rows at full budget keep theirs.
    """
    rows = range(real.shape[0])
    own = [[x for x in inputs if x.row == row] for row in rows]
    survivors = [sum(x.survivors for x in row) for row in own]
    text = (real & ~visual).sum(dim=1).tolist()
    return Plan(
        kept=[t + s for t, s in zip(text, survivors, strict=True)],
        survivors=survivors,
        # marks made under another budget may have left less than this one allows
        stage2=[min(sum(x.budget.stage2 for x in row), s) for row, s in zip(own, survivors, strict=True)],
        wiped=[wipes and any(x.budget.stage2 < x.present for x in row) for row in own],
        tail=int((real & ~visual).flip(1).long().cumprod(dim=1).sum(dim=1).min()),
    )
