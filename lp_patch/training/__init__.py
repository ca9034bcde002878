"""Training a pruner inside a frozen model (LearnPruner, section 3); slots without it; mixtures against it."""

from .attention import gated_attention
from .data import ConversationCollator, ConversationDataset
from .fit import fit
from .gate import GatedModel, new_pruner
from .merging import MergingTraining
from .run import TrainingRun, train
from .slots import SlotTraining, early_tokens, new_slots
from .trainer import PrunerTrainer, training_arguments

__all__ = [
    "ConversationCollator",
    "ConversationDataset",
    "GatedModel",
    "MergingTraining",
    "PrunerTrainer",
    "SlotTraining",
    "TrainingRun",
    "early_tokens",
    "fit",
    "gated_attention",
    "new_pruner",
    "new_slots",
    "train",
    "training_arguments",
]
