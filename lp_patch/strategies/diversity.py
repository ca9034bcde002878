"""DivPrune (arXiv 2503.02175): farthest points alone, which is what the engine does without scores."""

from .base import Scorer, register

register(Scorer("diversity", "DivPrune (2503.02175): greedy max-min cosine distance, training-free"))
