"""DivPrune: farthest points alone."""

from .base import Scorer, register

register(Scorer("diversity", "DivPrune: greedy max-min cosine distance, training-free", None))
