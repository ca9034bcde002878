"""The catalogue of selection strategies, by name; `config.scorer` and `config.text_scorer` pick.

Stage 1 (`SCORERS`): from encoder features to one score per token, higher is better, to the tokens to keep, or to the
weights by which they are mixed into fewer.
Stage 2 (`TEXT_SCORERS`): whose attention to the visual tokens is the score, or another score of theirs.

One short file each; importing it registers it. `print(catalogue())` lists them with their sources.
"""

from . import (  # noqa: F401  (importing registers)
    baselines,
    cls,
    covering,
    diversity,
    hiprune,
    iwp,
    last,
    learned,
    metacompress,
    oc_vtp,
    text,
    vispruner,
)
from .base import (
    SCORERS,
    TEXT_SCORERS,
    Reading,
    Scorer,
    Stage1Input,
    Stage2Input,
    TextScorer,
    attention_received,
    catalogue,
    may_use_pruner,
    register,
    resolve_scorer,
    resolve_text_scorer,
)
from .text import text_query_weights

__all__ = [
    "SCORERS",
    "TEXT_SCORERS",
    "Reading",
    "Scorer",
    "Stage1Input",
    "Stage2Input",
    "TextScorer",
    "attention_received",
    "catalogue",
    "may_use_pruner",
    "register",
    "resolve_scorer",
    "resolve_text_scorer",
    "text_query_weights",
]
