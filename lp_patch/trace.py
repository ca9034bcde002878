"""What a patched model did: the trace of its latest prefill, and a report of what that saved."""

import reprlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cut import left_mask, spread


class Shape(NamedTuple):
    """Where the stages begin: decoder layers in all, on stage-1 tokens, and before the final wipe (None: never)."""

    n_layers: int
    layer: int
    wipe_layer: int | None


@dataclass(frozen=True, repr=False)
class Trace:
    """What the latest prefill kept; one entry per sample. Indices number that sample's visual tokens in order.

    Attributes:
        visual_tokens: visual tokens in the prompt.
        stage1: (R1,) int64, ascending: tokens that reached the language model.
        stage2: (R2,) int64, ascending: tokens that stage 2 left, a subset of stage 1.
        stage1_scores: (visual tokens,) float32, or None where the strategy has no scores or nothing was pruned.
        stage2_scores: (R1,) float32, text-to-vision attention of the stage-1 survivors, or None without stage 2.
        tokens_per_layer: visual tokens that each decoder layer ran on.
        text_tokens: tokens of the prompt that are neither visual nor padding.
        mixtures: (R1, visual tokens) float32 where stage 1 merges: the token that stands in the place of `stage1[i]`
            is the sum of all by the weights of row i, and none is as it was, but for those of pictures within their
            budget. None where tokens are kept as they are, or where a mask hides a part of a mixed picture.
    """

    visual_tokens: list[int]
    stage1: list[Tensor]
    stage2: list[Tensor]
    stage1_scores: list[Tensor | None]
    stage2_scores: list[Tensor | None]
    tokens_per_layer: list[list[int]]
    text_tokens: list[int]
    mixtures: list[Tensor | None]

    def __repr__(self) -> str:
        shown, first, second = (
            reprlib.repr(x) for x in (self.visual_tokens, list(map(len, self.stage1)), list(map(len, self.stage2)))
        )
        how = "kept" if all(x is None for x in self.mixtures) else "mixtures of them"
        numbers = f"of {shown} visual tokens {first}, then {second} {how}"
        return f"<lp_patch.Trace: {len(self.visual_tokens)} prompts, {numbers}>"


class Encoded(NamedTuple):
    """What one call of an encoding method ran on.

    Attributes:
        rows: pictures, tiles or frames that the vision tower was given.
        tokens: of each in its layers, [CLS] included.
        projected: tokens that the projector ran on, over all rows, where stage 1 stands before it, else None.
        present: and without stage 1.
    """

    rows: int
    tokens: int
    projected: int | None = None
    present: int | None = None


class InputScores(NamedTuple):
    """Stage-1 scores (n,) of one visual input, whose tokens lie at `positions` (n,) of row `row`, on the host."""

    row: int
    positions: np.ndarray
    scores: Tensor


class InputMixtures(NamedTuple):
    """What the tokens that stage 1 left of one visual input are mixtures of: weights (R1, n), as `InputScores`."""

    row: int
    positions: np.ndarray
    weights: Tensor


class Record:
    """One prefill's decisions as device tensors; read into a `Trace` only when somebody asks.

    Args:
        shape: where the stages begin.
        visual: (B, S) bool on the host, visual tokens of the input.
        text: per row, tokens that are neither visual nor padding.
        wiped: per row, whether its last visual tokens vanish at `shape.wipe_layer`.
        stage1_scores: of the visual inputs that have any.

    Attributes:
        mixtures: of the visual inputs whose tokens were merged.
    """

    def __init__(
        self,
        shape: Shape,
        visual: np.ndarray,
        text: list[int],
        wiped: list[bool],
        stage1_scores: list[InputScores],
    ) -> None:
        self.shape = shape
        self.visual = visual
        self.text = text
        self.wiped = wiped
        self.stage1_scores = stage1_scores
        self.mixtures: list[InputMixtures] = []
        self.stage1: Tensor | None = None
        self.stage2: tuple[Tensor, Tensor, Tensor] | None = None
        self.encoded: list[Encoded] = []
        self.modalities: dict[str, np.ndarray] = {}  # (B, S) bool each: those of `visual` that are images, videos

    def note_encoded(self, encoded: list[Encoded]) -> None:
        """The prefill's features came of these encoding calls; those that came encoded have none."""
        self.encoded = encoded

    def note_stage1(self, where: Tensor) -> None:
        """Stage 1 left the tokens at `where` (B, N) of the input, -1 for padding."""
        self.stage1 = where

    def note_stage2(self, where: Tensor, chosen: Tensor, scores: Tensor) -> None:
        """Stage 2 chose `chosen` (B, N) of the tokens at `where` (B, N) of the input, by `scores` (B, N)."""
        self.stage2 = (where, chosen, scores)

    def trace(self) -> Trace:
        """Everything on the host, as users read it."""
        visual = torch.from_numpy(self.visual)
        kept = visual if self.stage1 is None else visual & left_mask(self.stage1.cpu(), visual.shape[1])
        removed, kept2, scores2 = ~kept, kept, None
        if self.stage2 is not None:
            where, chosen, scores = (x.cpu() for x in self.stage2)
            kept2 = spread(where, chosen, visual.shape[1])
            scores2 = spread(where, scores, visual.shape[1])
        stage1, stage2, stage2_scores, per_layer = [], [], [], []
        n_layers, layer, wipe_layer = self.shape
        for row in range(visual.shape[0]):
            seen = visual[row]
            survived = ~removed[row][seen]
            stage1.append(survived.nonzero().squeeze(1))
            stage2.append(kept2[row][seen].nonzero().squeeze(1))
            stage2_scores.append(None if scores2 is None else scores2[row][seen][survived])
            counts = [len(stage1[-1])] * layer + [len(stage2[-1])] * (n_layers - layer)
            if self.wiped[row] and wipe_layer is not None:
                counts[wipe_layer:] = [0] * (n_layers - wipe_layer)
            per_layer.append(counts)
        return Trace(
            visual_tokens=visual.sum(dim=1).tolist(),
            stage1=stage1,
            stage2=stage2,
            stage1_scores=[self._row_scores(row, seen) for row, seen in enumerate(visual)],
            stage2_scores=stage2_scores,
            tokens_per_layer=per_layer,
            text_tokens=list(self.text),
            mixtures=[self._row_mixtures(row, seen, kept[row]) for row, seen in enumerate(visual)],
        )

    def _row_scores(self, row: int, visual: Tensor) -> Tensor | None:
        """(visual tokens,) float32 if every visual token of the row was scored, else None."""
        scores = torch.full(visual.shape, torch.nan)
        for x in self.stage1_scores:
            if x.row == row:
                scores[torch.from_numpy(x.positions)] = x.scores.float().cpu()
        own = scores[visual]
        return None if len(own) == 0 or own.isnan().any() else own

    def _row_mixtures(self, row: int, visual: Tensor, kept: Tensor) -> Tensor | None:
        """(R1, visual tokens) float32 of a row's `kept` (S,) bool among its `visual` (S,); None: none is mixed."""
        own = [x for x in self.mixtures if x.row == row]
        if not own:
            return None
        weights = torch.eye(len(visual))
        for x in own:
            at = torch.from_numpy(x.positions)
            weights[at[kept[at]][:, None], at] = x.weights.float().cpu()
        return weights[kept][:, visual]
