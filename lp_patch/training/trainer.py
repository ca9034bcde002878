"""Training a pruner with transformers' own Trainer, which brings devices, precision, checkpoints and logs."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ..compat import warmup
from ..errors import ConfigError
from ..pruner import WEIGHTS_FILE
from .gate import GatedModel

LORA_FOLDER = "lora"
LOGGED = ("task_loss", "budget_loss", "kept")


def training_arguments(output_dir: str | Path, **options: Any) -> TrainingArguments:
    """TrainingArguments with our defaults, those of the nearest published recipe; `options` override them.

    AdamW, learning rate 2e-4, no weight decay, cosine after 3 % of warm-up, one epoch.
    """
    defaults = {"learning_rate": 2e-4, "lr_scheduler_type": "cosine", "num_train_epochs": 1, "logging_steps": 10}
    # samples are conversations, which only the collator makes into inputs
    return TrainingArguments(
        output_dir=str(output_dir), **{**defaults, **warmup(0.03), **options, "remove_unused_columns": False}
    )


class PrunerTrainer(Trainer):
    """transformers' Trainer for a `GatedModel`: it saves the pruner (and LoRA weights) alone, and logs both losses.

    Logs carry `task_loss`, `budget_loss` and `kept`, the share of visual tokens kept, as means since the last log.
    """

    def __init__(self, model: GatedModel, args: TrainingArguments, **options: Any) -> None:
        if not isinstance(model, GatedModel):
            raise ConfigError(f"PrunerTrainer trains a GatedModel, got {type(model).__name__}")
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not trained:
            raise ConfigError("nothing in this model requires a gradient: unfreeze the pruner, or add LoRA")
        super().__init__(model=model, args=args, **options)
        self._noted: list[Tensor] = []

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The gated model's own loss."""
        outputs = model(**inputs)
        self._noted.append(torch.stack([outputs[name].float() for name in LOGGED]))
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what was noted since the last time."""
        if self._noted:
            noted = self.accelerator.reduce(torch.stack(self._noted).mean(dim=0), "mean")
            self._noted.clear()
            logs = {**logs, **dict(zip(LOGGED, noted.tolist(), strict=True))}
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The pruner's files, and LoRA's below them; never the base model."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        gated = self._gated()
        gated.pruner.save_pretrained(folder)
        if gated.has_lora:
            gated.model.save_pretrained(str(folder / LORA_FOLDER))  # type: ignore[operator]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """What `_save` wrote."""
        folder, gated = Path(resume_from_checkpoint), self._gated()
        gated.pruner.load_state_dict(load_file(folder / WEIGHTS_FILE))
        if gated.has_lora:
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(gated.model, load_peft_weights(str(folder / LORA_FOLDER)))

    def _gated(self) -> GatedModel:
        gated = self.accelerator.unwrap_model(self.model)
        assert isinstance(gated, GatedModel)  # as given to the constructor
        return gated
