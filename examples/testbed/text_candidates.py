"""What stage 2 could rank tokens by, for ``text_scores.py``: candidates from what decoder layers up to k show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lp_patch.select import covering_points, select_tokens

TINY = 1e-6


@dataclass(frozen=True)
class Seen:
    """What one decoder layer shows of B questions that T text tokens ask about N visual ones.

    Attributes:
        attention: (B, H, T, N) float32, post-softmax over all that a text token sees.
        asks: (B, T) bool, text of the prompt after the picture; the others are answer and padding.
        template: (B, T) bool, text that every question has: a line break before it, "ASSISTANT:" after it.
        pointer: (B, T) bool, the word that the question is about.
        before: (B, N) float32, mean attention from the later visual tokens, which know no question.
        key: (B, KV, N, D); value: likewise.
        keep: visual tokens that stage 2 keeps.
    """

    attention: Tensor
    asks: Tensor
    template: Tensor
    pointer: Tensor
    before: Tensor
    key: Tensor
    value: Tensor
    keep: int

    @property
    def by_query(self) -> Tensor:
        """(B, T, N), the mean over heads; 0 where nobody asks."""
        return self.attention.mean(1) * self.asks[..., None]

    def mean(self, asks: Tensor) -> Tensor:
        """(B, N), the mean over heads and these tokens (B, T) bool, or with these weights."""
        weights = asks.float() / asks.float().sum(1, keepdim=True).clamp(min=TINY)
        return torch.einsum("btn,bt->bn", self.attention.mean(1), weights)

    @property
    def text(self) -> Tensor:
        """(B, N), what the library does."""
        return self.mean(self.asks)

    def one(self, last: bool) -> Tensor:
        """(B, N), attention of the last token of the prompt alone, or of the first one after the picture."""
        order = torch.arange(self.asks.shape[1])
        end = torch.where(self.asks, order, -1).amax(1) if last else self.asks.float().argmax(1)
        return self.mean(order == end[:, None])

    @property
    def own(self) -> Tensor:
        """(B, H, T, N), each query's attention as shares of what it gives to visual tokens; 0 where nobody asks."""
        shares = self.attention / self.attention.sum(3, keepdim=True).clamp(min=TINY)
        return shares * self.asks[:, None, :, None]


def content(seen: Seen) -> Tensor:
    """Text that is no part of the template."""
    return seen.asks & ~seen.template


def specific(seen: Seen) -> Tensor:
    """(B, T), how far each token's shares are from the mean of all: their Kullback-Leibler divergence."""
    shares = seen.own.mean(1)
    mean = shares.sum(1, keepdim=True) / seen.asks.sum(1)[:, None, None]
    return (shares * (shares.clamp(min=TINY) / mean.clamp(min=TINY)).log()).sum(2).clamp(min=0) * seen.asks


def peaked(seen: Seen) -> Tensor:
    """(B, T), the chance that two draws from a token's shares agree."""
    return seen.own.mean(1).square().sum(2) * seen.asks


def by_head(seen: Seen) -> Tensor:
    """(B, H, N), the mean over the text."""
    return (seen.attention * seen.asks[:, None, :, None]).sum(2) / seen.asks.sum(1)[:, None, None]


def weigh_heads(seen: Seen, weights: Tensor) -> Tensor:
    """(B, N), heads by these weights (B, H)."""
    return (by_head(seen) * (weights / weights.sum(1, keepdim=True))[..., None]).sum(1)


def varied(seen: Seen) -> Tensor:
    """(B, H, N), standard deviation of a head's attention over the text's tokens."""
    mean = by_head(seen)[:, :, None]
    square = (seen.attention - mean).square() * seen.asks[:, None, :, None]
    return (square.sum(2) / seen.asks.sum(1)[:, None, None]).sqrt()


def norm(x: Tensor, seen: Seen) -> Tensor:
    """(B, H, 1, N), lengths of keys or values (B, KV, N, D), for each head."""
    return x.norm(dim=3).repeat_interleave(seen.attention.shape[1] // x.shape[1], 1)[:, :, None]


def of_attention(seen: Seen, attention: Tensor) -> Tensor:
    """(B, N), the mean over heads and text of another attention (B, H, T, N)."""
    return (attention * seen.asks[:, None, :, None]).mean(1).sum(1)


def spread(seen: Seen, score: Tensor, features: Tensor | None = None) -> Tensor:
    """(B, N), the order of `covering_points` by this score (B, N), alike being cosines of values, or features."""
    features = seen.value if features is None else features
    chosen = covering_points(features.transpose(1, 2).flatten(2), score, seen.keep)
    order = torch.arange(seen.keep, 0, -1.0).expand(chosen.shape)
    return torch.zeros_like(score).scatter(1, chosen, order)


def half_diverse(seen: Seen) -> Tensor:
    """(B, N), 1 where `select_tokens` keeps: half by attention, half by farthest points among values."""
    chosen = select_tokens(seen.value.transpose(1, 2).flatten(2), seen.text, seen.keep, 0.5)
    return torch.zeros_like(seen.text).scatter(1, chosen, 1.0)


def ranked(x: Tensor) -> Tensor:
    """(B, N), each token's rank from 0 to 1."""
    return x.argsort(1).argsort(1) / (x.shape[1] - 1)


Candidate = Callable[[list[Seen]], Tensor]


def last_of(score: Callable[[Seen], Tensor]) -> Candidate:
    """A candidate that reads layer k alone."""
    return lambda layers: score(layers[-1])


CANDIDATES: dict[str, Candidate] = {
    name: last_of(score)
    for name, score in {
        "text": lambda x: x.text,
        "last": lambda x: x.one(True),
        # (a) content words
        "no_template": lambda x: x.mean(content(x)),
        "template_only": lambda x: x.mean(x.asks & x.template),
        "specific_words": lambda x: x.mean(specific(x)),
        "specific_words_shares": lambda x: (x.own.mean(1) * specific(x)[..., None]).sum(1),
        "peaked_words": lambda x: x.mean(peaked(x)),
        "most_of_any_word": lambda x: x.by_query.amax(1),
        "shares": lambda x: x.own.mean(1).sum(1),
        # (b) less what does not depend on the question
        "minus_last": lambda x: x.text - x.one(True),
        "minus_first": lambda x: x.text - x.one(False),
        "minus_template": lambda x: x.mean(content(x)) - x.mean(x.asks & x.template),
        "over_last": lambda x: x.text / (x.one(True) + TINY),
        "over_first": lambda x: x.text / (x.one(False) + TINY),
        "over_template": lambda x: x.mean(content(x)) / (x.mean(x.asks & x.template) + TINY),
        "minus_visual": lambda x: x.text - x.before,
        "over_visual": lambda x: x.text / (x.before + TINY),
        "over_root_visual": lambda x: x.text / (x.before + TINY).sqrt(),
        "deviation": lambda x: varied(x).mean(1),
        # (d) norms
        "value_norm": lambda x: of_attention(x, x.attention * norm(x.value, x)),
        "value_norm_centred": lambda x: of_attention(x, x.attention * norm(x.value - x.value.mean(2, True), x)),
        "over_value_norm": lambda x: of_attention(x, x.attention / norm(x.value, x)),
        "over_key_norm": lambda x: of_attention(x, x.attention / norm(x.key, x)),
        # heads
        "most_of_any_head": lambda x: by_head(x).amax(1),
        "median_head": lambda x: by_head(x).median(1).values,
        "log_heads": lambda x: (by_head(x) + TINY).log().mean(1),
        "heads_by_mass": lambda x: weigh_heads(x, by_head(x).sum(2)),
        "head_shares": lambda x: (by_head(x) / by_head(x).sum(2, keepdim=True)).mean(1),
        "sharp_heads": lambda x: weigh_heads(x, (by_head(x) / by_head(x).sum(2, keepdim=True)).square().sum(2)),
        "varied_heads": lambda x: weigh_heads(x, varied(x).sum(2) / by_head(x).sum(2)),
    }.items()
}
# (c) layers
CANDIDATES |= {
    "two_layers": lambda layers: layers[-1].text + layers[-2].text,
    "two_layers_shares": lambda layers: sum(x.text / x.text.sum(1, True) for x in layers[-2:]),
    "three_layers_shares": lambda layers: sum(x.text / x.text.sum(1, True) for x in layers[-3:]),
    "all_layers_shares": lambda layers: sum(x.text / x.text.sum(1, True) for x in layers),
    "later_half_shares": lambda layers: sum(x.text / x.text.sum(1, True) for x in layers[len(layers) // 2 :]),
    "all_layers_log": lambda layers: sum((x.text + TINY).log() for x in layers),
    "later_half_log": lambda layers: sum((x.text + TINY).log() for x in layers[len(layers) // 2 :]),
    "all_layers_over_visual": lambda layers: sum(((x.text + TINY) / (x.before + TINY)).log() for x in layers),
    "later_half_over_visual": lambda layers: sum(
        ((x.text + TINY) / (x.before + TINY)).log() for x in layers[len(layers) // 2 :]
    ),
}
"""From the layers up to k, that one last, to scores (B, N) of the visual tokens that stage 1 left."""

# a choice made one by one: a token counts for less the more it resembles one that is kept
CANDIDATES |= {
    "spread": lambda layers: spread(layers[-1], layers[-1].text),
    "spread_root": lambda layers: spread(layers[-1], layers[-1].text.sqrt()),
    "spread_keys": lambda layers: spread(layers[-1], layers[-1].text, layers[-1].key),
    "spread_no_template": lambda layers: spread(layers[-1], layers[-1].mean(content(layers[-1]))),
    "spread_norm": lambda layers: spread(
        layers[-1], of_attention(layers[-1], layers[-1].attention * norm(layers[-1].value, layers[-1]))
    ),
    "spread_over_visual": lambda layers: spread(layers[-1], layers[-1].text / (layers[-1].before + TINY)),
    "spread_two_layers": lambda layers: spread(layers[-1], CANDIDATES["two_layers_shares"](layers)),
    "spread_three_layers": lambda layers: spread(layers[-1], CANDIDATES["three_layers_shares"](layers)),
    "spread_alone": lambda layers: spread(layers[-1], torch.ones_like(layers[-1].text)),
}

# half of R2 goes to what is least like the rest
CANDIDATES["text_50_diverse"] = lambda layers: half_diverse(layers[-1])

BOUNDS = {
    "pointer": "attention of the word that the question is about",
    "minus_other_questions": "text, less the mean over other questions on the same picture",
    "over_other_questions": "text, over it",
    "over_position": "text, over its mean at that patch in other pictures",
    "standard_by_position": "text, less that mean, over its deviation",
    "true_patches": "the patches that the question is about, then text",
    "stage1": "the order in which stage 1 chose",
    "random": "a seeded draw",
}
"""Candidates that know what no strategy of stage 2 knows."""


def bounds(
    layers: list[Seen], rows: Tensor, wanted: Tensor, order: Tensor, usual: Tensor, seed: int
) -> dict[str, Tensor]:
    """The scores (B, N) of `BOUNDS`.

    Args:
        rows: (B,) int64, which picture each question is on.
        wanted: (B, N) bool, visual tokens that the question is about.
        order: (B, N) int64, when stage 1 chose each.
        usual: (2, B, N) float32, mean and standard deviation of `text` where each lies.
    """
    seen, own = layers[-1], layers[-1].text
    others = ((rows[:, None] == rows) & ~torch.eye(len(rows), dtype=torch.bool)).float()
    neutral = others @ own / others.sum(1, keepdim=True).clamp(min=1)
    mean, deviation = usual
    scores = (
        seen.mean(seen.pointer),
        own - neutral,
        own / (neutral + TINY),
        own / mean,
        (own - mean) / deviation,
        wanted + ranked(own),
        -order.float(),
        torch.rand(own.shape, generator=torch.Generator().manual_seed(seed)),
    )
    return dict(zip(BOUNDS, scores, strict=True))
