"""The catalogue of selection strategies, by name. One function each; `config.scorer` and `config.text_scorer` pick.

Stage 1 (`SCORERS`): a function from encoder features to one score per token, higher is better.
Stage 2 (`TEXT_SCORERS`): a function that weighs the queries whose attention to the visual tokens is the score.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError
from .pruner import LearnablePruner


@dataclass(frozen=True)
class Stage1Input:
    """What a stage-1 scorer may read.

    Attributes:
        features: (B, N, C), the tokens of B equally long visual inputs, as the projector would receive them.
        keep: tokens that will be chosen by score, ``1 <= keep <= N``.
        seed: `PruningConfig.seed`.
        cls_attention: (B, N) float32, attention from [CLS] to each token, for scorers that declare it.
        pruner: the learned module, for the scorer "learned".
    """

    features: Tensor
    keep: int
    seed: int
    cls_attention: Tensor | None = None
    pruner: LearnablePruner | None = None


@dataclass(frozen=True)
class Scorer:
    """A catalogue entry: `score` maps a `Stage1Input` to (B, N) scores; None means farthest points alone."""

    name: str
    source: str
    score: Callable[[Stage1Input], Tensor] | None
    needs_cls_attention: bool = False
    needs_pruner: bool = False


def _learned(x: Stage1Input) -> Tensor:
    assert x.pruner is not None  # `resolve_scorer` refuses the combination
    return x.pruner.score(x.features)


def _cls(x: Stage1Input) -> Tensor:
    assert x.cls_attention is not None  # the attention tap is installed for this scorer
    return x.cls_attention


def _random(x: Stage1Input) -> Tensor:
    # one draw for all inputs, so that a row of a batch keeps what it would keep alone
    generator = torch.Generator().manual_seed(x.seed)
    batch, n_tokens, _ = x.features.shape
    return torch.rand(n_tokens, generator=generator).to(x.features.device).expand(batch, n_tokens)


def _uniform(x: Stage1Input) -> Tensor:
    batch, n_tokens, _ = x.features.shape
    # `keep` evenly spaced centres
    index = ((2 * torch.arange(x.keep) + 1) * n_tokens) // (2 * x.keep)
    return torch.zeros(n_tokens).index_fill_(0, index, 1.0).to(x.features.device).expand(batch, n_tokens)


SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        Scorer(
            "learned", "LearnPruner, section 3: keep probability of the trained module", _learned, needs_pruner=True
        ),
        Scorer("diversity", "DivPrune: greedy max-min cosine distance, training-free", None),
        Scorer("cls", "[CLS] attention at the layer the features come from", _cls, needs_cls_attention=True),
        Scorer("random", "baseline: one seeded draw", _random),
        Scorer("uniform", "baseline: evenly spaced in raster order", _uniform),
    )
}


def text_query_weights(is_text: Tensor, is_visual: Tensor, kept: Tensor | None = None) -> Tensor:
    """Equal weight on every text token after the last visual token of its row (LearnPruner, section 3; set: ours).

    Text before an image contributes exactly zero under the causal mask; text between the frames of a video does not
    ask either, even where nothing is left of the last frame. A row without text after its images asks with its last
    token that is left, so that the query set is never empty.

    Args:
        is_text: (B, S) bool, real tokens that are not visual.
        is_visual: (B, S) bool, visual tokens of the prompt.
        kept: (B, S) bool, tokens that are left; None: all.

    Returns:
        (B, S) float32; each row that holds a token sums to 1.
    """
    positions = torch.arange(is_text.shape[1], device=is_text.device)
    last_visual = torch.where(is_visual, positions, -1).amax(dim=1, keepdim=True)
    queries = is_text & (positions > last_visual)
    left = is_text | is_visual if kept is None else (is_text | is_visual) & kept
    last_left = torch.where(left, positions, -1).amax(dim=1, keepdim=True)
    queries = queries | ((positions == last_left) & ~queries.any(dim=1, keepdim=True))
    return queries.float() / queries.sum(dim=1, keepdim=True).clamp(min=1)


TEXT_SCORERS: dict[str, Callable[..., Tensor]] = {"text": text_query_weights}


def resolve_scorer(name: str, pruner: LearnablePruner | None) -> Scorer:
    """The stage-1 strategy that `name` means; "auto" is "learned" where a pruner is given, else "diversity"."""
    if name == "auto":
        name = "learned" if pruner is not None else "diversity"
    if name not in SCORERS:
        raise ConfigError(f"unknown scorer {name!r}. Allowed: auto, {', '.join(sorted(SCORERS))}")
    scorer = SCORERS[name]
    if scorer.needs_pruner and pruner is None:
        raise ConfigError(f'scorer="{name}" needs trained weights: pass pruner=..., or scorer="diversity"')
    if pruner is not None and not scorer.needs_pruner:
        raise ConfigError(f'a pruner was given but scorer="{name}" does not use it: drop one of the two')
    return scorer


def resolve_text_scorer(name: str) -> Callable[..., Tensor]:
    """The stage-2 strategy that `name` means."""
    if name not in TEXT_SCORERS:
        raise ConfigError(f"unknown text_scorer {name!r}. Allowed: {', '.join(sorted(TEXT_SCORERS))}")
    return TEXT_SCORERS[name]
