"""A whole training run, from a checkpoint and a file of conversations to a pruner's folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..pruner import LearnablePruner
from .data import ConversationCollator, ConversationDataset
from .gate import GatedModel
from .trainer import PrunerTrainer, training_arguments


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class TrainingRun:
    """What `train` is asked to do: options of ``lp-patch train``, whose help describes each.

    Attributes:
        model: checkpoint, a Hub id or a folder.
        data: JSON file in LLaVA's conversation format.
        output: folder for the pruner; checkpoints go below it.
    """

    model: str
    data: Path
    output: Path
    images: Path | None = field(
        default=None, metadata={"help": "folder that image names start from (default: the JSON's own)"}
    )
    share: float = _option(0.1, "of the samples with images (paper: 0.1)")
    objective: Literal["ntp", "distill"] = _option("ntp", "ntp is the paper's")
    weight: float = _option(1.0, "how much the term that asks for few tokens counts in the loss (paper: 1)")
    tau: float = _option(0.0, "share of tokens that this term lets be kept for nothing (paper: 0)")
    difference: bool = _option(False, "the gate's gradient as a difference, bounded (ours)")
    seed: int = _option(0, "of the pruner's start, and of the samples")
    batch: int = _option(8, "samples a device at once")
    accumulate: int = _option(1, "batches a step, equal to a larger batch (paper-like: 64 samples a step)")
    learning_rate: float = _option(2e-4, "at its height")
    steps: int = _option(-1, "updates (-1: one epoch of the share)")
    dtype: Literal["float32", "bfloat16", "float16"] = _option("bfloat16", "of the base model")
    max_length: int | None = _option(None, "cut conversations to so many tokens; one without answers is skipped")
    checkpointing: bool = _option(False, "gradient checkpointing: less memory, more time")
    pruner: str | None = _option(None, "start from this pruner: a folder or Hub id")
    lora_rank: int = _option(0, "heal the language model with LoRA of this rank")
    freeze_pruner: bool = _option(False, "train LoRA alone, for a trained pruner")
    save_steps: int = _option(100, "updates between checkpoints")
    workers: int = _option(1, "processes that load pictures")


def train(run: TrainingRun) -> LearnablePruner:
    """Train a pruner, or go on from the last checkpoint below `run.output`, and save it there.

    Only the pruner trains (and LoRA, where asked for); the base model stays frozen. LearnPruner, section 3.
    """
    set_seed(run.seed)
    dtype = getattr(torch, run.dtype)
    model: Any = AutoModelForImageTextToText.from_pretrained(run.model, dtype=dtype).requires_grad_(False)
    if run.lora_rank:
        from peft import LoraConfig, get_peft_model

        layers = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        model = get_peft_model(model, LoraConfig(r=run.lora_rank, lora_alpha=2 * run.lora_rank, target_modules=layers))
    pruner = LearnablePruner.from_pretrained(run.pruner) if run.pruner else None
    gated = GatedModel(
        model, pruner, objective=run.objective, weight=run.weight, tau=run.tau, difference=run.difference
    )
    gated.pruner.requires_grad_(not run.freeze_pruner)
    if run.checkpointing:
        gated.activation_checkpointing_enable()
    dataset = ConversationDataset(run.data, run.images, share=run.share, seed=run.seed)
    print(f"{len(dataset)} samples ({dataset.skipped} without an image skipped)")
    config: Any = gated.config
    gated.pruner.base_model, gated.pruner.model_type = run.model, config.model_type
    noted = ("seed", "weight", "tau", "difference", "steps", "batch", "accumulate")
    info: dict[str, Any] = {
        "objective": run.objective,
        "data": run.data.name,
        **{name: getattr(run, name) for name in noted},
        "learning_rate": run.learning_rate,
    }
    gated.pruner.training_info = info
    checkpoints = run.output / "checkpoints"
    trainer = PrunerTrainer(
        gated,
        training_arguments(
            checkpoints,
            learning_rate=run.learning_rate,
            per_device_train_batch_size=run.batch,
            gradient_accumulation_steps=run.accumulate,
            max_steps=run.steps,
            save_steps=run.save_steps,
            save_total_limit=2,
            seed=run.seed,
            dataloader_num_workers=run.workers,
            report_to=[],
        ),
        train_dataset=dataset,
        data_collator=ConversationCollator(
            AutoProcessor.from_pretrained(run.model), max_length=run.max_length, dtype=dtype
        ),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    info["samples"] = round(trainer.state.epoch * len(dataset)) - trainer.skipped
    info["skipped"] = trainer.skipped
    trainer.save_model(str(run.output))
    return gated.pruner
