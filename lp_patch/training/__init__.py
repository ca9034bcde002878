"""Training a pruner inside a frozen model (LearnPruner, section 3)."""

from .attention import gated_attention
from .data import ConversationCollator, ConversationDataset
from .gate import GatedModel, new_pruner
from .run import TrainingRun, train
from .trainer import PrunerTrainer, training_arguments

__all__ = [
    "ConversationCollator",
    "ConversationDataset",
    "GatedModel",
    "PrunerTrainer",
    "TrainingRun",
    "gated_attention",
    "new_pruner",
    "train",
    "training_arguments",
]
