"""What a strategy is, the catalogue by name, and how names resolve."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedInputError
from ..pruner import LearnablePruner, Pruner
from ..score import received_attention


class Reading(NamedTuple):
    """What a scorer wants to know of the vision encoder: the attention that each token receives, or the tokens.

    Attributes:
        of: whose attention, averaged over heads: "cls", or "all" for the mean over every token, [CLS] included. Or
            "tokens": the tokens after this layer, normalised as the next one's attention is given them.
        depth: in which layer, as a share of those up to the one whose output the features are; 1 is that layer, whose
            tokens are `Stage1Input.features`.
    """

    of: str = "cls"
    depth: float = 1.0


@dataclass(frozen=True)
class Stage1Input:
    """What a stage-1 strategy may read.

    Attributes:
        features: (B, N, C), the tokens of B equally long visual inputs, as the projector would receive them.
        keep: tokens to choose, ``1 <= keep <= N``; for `Scorer.score` without the share that diversity chooses.
        seed: `PruningConfig.seed`.
        attention: for each of `Scorer.reads`, in their order, (B, N) float32, or (B, N, C) for "tokens".
        pruner: the trained weights, for a scorer that needs any.
    """

    features: Tensor
    keep: int
    seed: int
    attention: tuple[Tensor, ...] = ()
    pruner: Pruner | None = None


@dataclass(frozen=True)
class Scorer:
    """A stage-1 strategy. With none of `score`, `select` and `mix`, farthest points alone choose.

    Attributes:
        name: for `PruningConfig.scorer`.
        source: its line in the catalogue: what it does, whose it is.
        score: to (B, N) scores; the highest are kept, beside the share of R1 that `PruningConfig.diversity` gives to
            farthest points.
        select: to (B, keep) int64, distinct indices, for a method with a rule of its own: `diversity` does not apply,
            and the trace has no scores.
        mix: to (B, keep, N) float weights, whose rows sum to 1, for a method that merges: each of the `keep` tokens is
            that mixture of all N. `lp_patch.merging.standing` says where it stands, the trace shows the weights.
            Refused for families whose projector does not work token by token.
        reads: attention or tokens of the vision encoder; refused for families without [CLS].
        needs_pruner: whether it needs trained weights.
        kind: of which kind.
        keeps_all: no stage 1: every layer up to stage 2 runs on all tokens.
    """

    name: str
    source: str
    score: Callable[[Stage1Input], Tensor] | None = None
    select: Callable[[Stage1Input], Tensor] | None = None
    mix: Callable[[Stage1Input], Tensor] | None = None
    reads: tuple[Reading, ...] = ()
    needs_pruner: bool = False
    kind: str = LearnablePruner.kind
    keeps_all: bool = False


@dataclass(frozen=True)
class Stage2Input:
    """What a stage-2 strategy may read: decoder layer k's own attention, on a sequence that stage 1 has shortened.

    Attributes:
        query: (B, H, Q, D), rotated; the Q queries are the last ones of the sequence.
        key: (B, KV, K, D), rotated, ``K >= N``: tokens of earlier turns come first.
        value: (B, KV, K, D).
        key_mask: (B, K) bool, True where a key is real, or (B, Q, K), where a query sees it; None means all are.
        weights: (B, Q) float32, how much each query asks; rows sum to 1.
        scaling: the layer's factor on the dot product.
        visual: (B, N) bool, the tokens to score among the N of this prompt.
        keep: the most tokens that a row keeps.
        rotary: cos and sin, (B or 1, N, D) each, by which the N tokens were rotated.
        sinks: (H,) logits of one more key that nobody has, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    weights: Tensor
    scaling: float
    visual: Tensor
    keep: int
    rotary: tuple[Tensor, ...]
    sinks: Tensor | None = None

    def unrotated(self, x: Tensor) -> Tensor:
        """Queries or keys of the last T tokens (B, H, T, D) as they were before their rotation, in float32."""
        length, dim = x.shape[2:]
        if len(self.rotary) != 2 or any(part.shape[2:] != (dim,) for part in self.rotary):
            raise UnsupportedInputError(
                f"this text_scorer undoes the rotary embedding, and needs it as (batch, tokens, {dim}), got "
                f"{[tuple(part.shape) for part in self.rotary]}: use another text_scorer, or a newer transformers"
            )
        cos, sin = (part[:, None, -length:].to(x.device).float() for part in self.rotary)
        first, second = x.float().chunk(2, dim=3)
        turned = torch.cat([-second, first], dim=3)
        # some rotations scale as well
        return (x.float() * cos - turned * sin) / (cos**2 + sin**2)


def attention_received(x: Stage2Input) -> Tensor:
    """(B, N): post-softmax attention from the weighted queries, averaged over heads."""
    by_order = x.key_mask is None or x.key_mask.dim() == 2
    received = received_attention(
        x.query, x.key, x.weights, x.scaling, key_mask=x.key_mask, causal=by_order, sinks=x.sinks
    )
    return received[:, -x.visual.shape[1] :]


@dataclass(frozen=True)
class TextScorer:
    """A stage-2 strategy.

    Attributes:
        name: for `PruningConfig.text_scorer`.
        source: its line in the catalogue.
        weigh: which tokens ask: (is_text, is_visual, kept), each (B, S) bool (`text_query_weights` says what they
            are), to (B, S) weights whose rows sum to 1.
        score: to (B, N) scores, of which those at visual tokens count; the highest are kept.
        layer: default of `PruningConfig.layer`; None: ``round(0.375 L)``.
        alone: a whole method without stage 1, refused beside one.
        unrotates: it undoes the rotary embedding; refused where that is not Llama's.
    """

    name: str
    source: str
    weigh: Callable[[Tensor, Tensor, Tensor], Tensor]
    score: Callable[[Stage2Input], Tensor] = attention_received
    layer: int | None = None
    alone: bool = False
    unrotates: bool = False


SCORERS: dict[str, Scorer] = {}
TEXT_SCORERS: dict[str, TextScorer] = {}


def register(strategy: Scorer | TextScorer) -> None:
    """Add a strategy to the catalogue; refuses a name that is taken."""
    if not isinstance(strategy, (Scorer, TextScorer)):
        raise ConfigError(f"register takes a Scorer or a TextScorer, got {type(strategy).__name__}: {strategy!r}")
    known: dict = SCORERS if isinstance(strategy, Scorer) else TEXT_SCORERS
    if strategy.name in (*known, "auto"):
        raise ConfigError(f"the name {strategy.name!r} is taken. Taken: auto, {', '.join(sorted(known))}")
    if isinstance(strategy, Scorer):
        given = [name for name in ("score", "select", "mix") if getattr(strategy, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{strategy.name!r} brings both {' and '.join(given)}: give one of them")
    known[strategy.name] = strategy


def catalogue() -> str:
    """All strategies with their sources, as a table to print."""
    lines = []
    for option, known in (("scorer", SCORERS), ("text_scorer", TEXT_SCORERS)):
        lines += [f"{f'{option}={name!r}':<26} {known[name].source}" for name in sorted(known)]
    return "\n".join(lines)


def may_use_pruner(name: str) -> bool:
    """Whether the stage-1 strategy that `name` means reads a pruner where there is one."""
    return name == "auto" or (name in SCORERS and SCORERS[name].needs_pruner)


def resolve_scorer(name: str, pruner: Pruner | None) -> Scorer:
    """The stage-1 strategy that `name` means; "auto" is that of the pruner's kind, "diversity" without one."""
    if name == "auto":
        name = pruner.kind if pruner is not None else "diversity"
    if name not in SCORERS:
        raise ConfigError(_unknown(name, "scorer", SCORERS, "text_scorer", TEXT_SCORERS))
    scorer = SCORERS[name]
    if scorer.needs_pruner and pruner is None:
        raise ConfigError(f'scorer="{name}" needs trained weights: pass pruner=..., or scorer="diversity"')
    if pruner is not None and not scorer.needs_pruner:
        raise ConfigError(f'a pruner was given but scorer="{name}" does not use it: drop one of the two')
    if pruner is not None and pruner.kind != scorer.kind:
        raise ConfigError(
            f'scorer="{name}" reads weights of kind {scorer.kind!r}, the pruner is of kind {pruner.kind!r} '
            f'({type(pruner).__name__}): pass scorer="{pruner.kind}", or another pruner'
        )
    return scorer


def resolve_text_scorer(name: str) -> TextScorer:
    """The stage-2 strategy that `name` means."""
    if name not in TEXT_SCORERS:
        raise ConfigError(_unknown(name, "text_scorer", TEXT_SCORERS, "scorer", SCORERS))
    return TEXT_SCORERS[name]


def _unknown(name: str, option: str, known: dict, other: str, others: dict) -> str:
    """What to say of a name that is not `known` to `option`: the other option's, a method's own name, a near miss."""
    lower = name.lower()
    allowed = [*(["auto"] if option == "scorer" else []), *sorted(known)]
    # sources begin with the method's own name: "DivPrune (2503.02175): ..."
    papers = {key: re.match(r"([\w-]+) \(\d", known[key].source) for key in sorted(known, reverse=True)}
    methods = {paper[1].lower(): key for key, paper in papers.items() if paper}
    near = difflib.get_close_matches(lower, [*allowed, *methods], n=1)
    hint = "."
    if lower in others:
        alone = 'scorer="none", ' if getattr(others[lower], "alone", False) else ""
        hint = f': it is a {other}, pass {alone}{other}="{lower}".'
    elif near:
        hint = f"; did you mean {methods.get(near[0], near[0])!r}?"
    return f"unknown {option} {name!r}{hint} Allowed: {', '.join(allowed)}"
