"""The catalogue of selection strategies, by name; `config.scorer` and `config.text_scorer` pick.

Stage 1 (`SCORERS`): a function from encoder features to one score per token, higher is better.
Stage 2 (`TEXT_SCORERS`): a function that weighs the queries whose attention to the visual tokens is the score.

One short file each; importing it registers it.
"""

from . import baselines, cls, diversity, learned, text  # noqa: F401  (importing registers)
from .base import SCORERS, TEXT_SCORERS, Scorer, Stage1Input, register, resolve_scorer, resolve_text_scorer
from .text import text_query_weights

__all__ = [
    "SCORERS",
    "TEXT_SCORERS",
    "Scorer",
    "Stage1Input",
    "register",
    "resolve_scorer",
    "resolve_text_scorer",
    "text_query_weights",
]
