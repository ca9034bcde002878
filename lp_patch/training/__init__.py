"""Training a pruner inside a frozen model (LearnPruner, section 3)."""

from .attention import gated_attention
from .data import ConversationCollator, ConversationDataset
from .gate import GatedModel, new_pruner
from .trainer import PrunerTrainer, training_arguments

__all__ = [
    "ConversationCollator",
    "ConversationDataset",
    "GatedModel",
    "PrunerTrainer",
    "gated_attention",
    "new_pruner",
    "training_arguments",
]
