"""Training a pruner with transformers' own Trainer, which brings devices, precision, checkpoints and logs."""

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from ..compat import warmup
from ..errors import ConfigError, UnsupportedInputError
from ..pruner import FACTS, WEIGHTS_FILE, LearnablePruner
from .data import IGNORED, listed
from .gate import GatedModel

LORA_FOLDER = "lora"
LOGGED = ("task_loss", "budget_loss", "kept")
_SEARCHED = 64  # samples, for one to begin with


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

    Logs carry `task_loss`, `budget_loss` and `kept`, the share of visual tokens kept, as means over the steps since the
    last log; evaluation has them as `eval_task_loss` and so on, over its whole data set, whatever its batches.

    The loss is that of all samples of an optimizer step: devices and `gradient_accumulation_steps` divide them without
    changing the gradient (see `GatedModel`; `average_tokens_across_devices=False` keeps the devices' tasks apart).

    Samples that nothing can be learned from end no run. The collator leaves them out; where no other is left in a
    batch, the batch before stands in, so that all devices keep step. `skipped` in the logs counts them, and a warning
    at the end. Data of which nothing can be learned are refused, and so is a loss that is not finite.

    Attributes:
        skipped: samples left out up to the last log, on all devices, and before an interruption.

    Raises:
        ConfigError: not a GatedModel, nothing to train, an option of Trainer that would have no effect, or a kind of
            parallelism that the gate or the pruner's files cannot follow.
    """

    def __init__(self, model: GatedModel, args: TrainingArguments, **options: Any) -> None:
        if not isinstance(model, GatedModel):
            raise ConfigError(f"PrunerTrainer trains a GatedModel, got {type(model).__name__}")
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not trained:
            raise ConfigError("nothing in this model requires a gradient: unfreeze the pruner, or add LoRA")
        given = {**options, "label_smoothing_factor": args.label_smoothing_factor or None}
        for name in ("compute_metrics", "compute_loss_func", "label_smoothing_factor"):
            if given.get(name) is not None:
                raise ConfigError(f"{name} has no effect here: a GatedModel has its own loss, and predicts nothing")
        super().__init__(model=model, args=args, **options)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{self.args.n_gpu} GPUs in one process would share the gate's state: start a process for each with "
                "torchrun --nproc-per-node, or show one with CUDA_VISIBLE_DEVICES"
            )
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
            raise ConfigError("FSDP 1 flattens the pruner's weights, which cannot be saved then: set fsdp_version 2")
        self._noted: list[Tensor] = []  # (4,) each: task, budget, kept, whether it ends a step; since the last log
        self._evaluated: list[Tensor] = []  # (5,) each: summed task, its positions, kept tokens, tokens, left out
        self._faults: list[str] = []  # the samples left out on this device
        self._counted = 0  # of these, how many are in the logs
        self._earlier: Tensor | None = None
        self._before: dict | None = None

    @property
    def skipped(self) -> int:
        """Samples left out up to the last log, on all devices."""
        return int(next((log["skipped"] for log in reversed(self.state.log_history) if "skipped" in log), 0))

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        """The parts of a step, each with something to learn; nothing is left of a step that was broken off."""
        self._earlier = None
        return super().get_batch_samples(map(self._usable, epoch_iterator), *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """A part's share of the step's loss; the last part brings the budget of all, on all devices."""
        last = self.accelerator.sync_gradients
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, part=True, earlier=self._earlier)
        self._earlier = outputs.earlier
        # Trainer divides the loss by the parts unless it counted positions, and takes the mean over devices
        task, parts = outputs.loss, 1
        if num_items_in_batch is None:
            parts = self.current_gradient_accumulation_steps
        elif self.args.average_tokens_across_devices:
            task = task * self.accelerator.num_processes
        budget, kept = self._budget(outputs.kept_tokens, outputs.tokens) if last else outputs.kept.new_zeros(2)
        loss = task + parts * budget
        if self.accelerator.scaler is None and not loss.isfinite():  # a scaler leaves such a step out
            raise UnsupportedInputError(
                f"the loss is {loss.item()}; a step with it would ruin the weights. Go on from the last checkpoint, "
                "with a lower learning rate or the base model in another precision"
            )
        noted = [task.detach().float() / parts, budget.detach(), kept, kept.new_tensor(float(last))]
        self._noted.append(torch.stack(noted))
        return (loss, outputs) if return_outputs else loss

    def _budget(self, kept_tokens: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The budget term of a whole step, and the share of visual tokens that it keeps."""
        gated = self._gated()
        all_kept, all_tokens = self.accelerator.reduce(torch.stack([kept_tokens.detach(), tokens]), "sum")
        kept = all_kept / all_tokens
        # the square's gradient for this device's tokens, times the devices that gradients are then divided by
        slope = 2 * (kept - gated.tau) * self.accelerator.num_processes / all_tokens
        return gated.weight * ((kept - gated.tau) ** 2 + slope * (kept_tokens - kept_tokens.detach())), kept

    def _usable(self, batch: dict) -> dict:
        """A batch, or in place of one that nothing can be learned from the one before."""
        faults, usable = _parted(batch)
        self._faults += faults
        self._before = usable or self._before or self._found()
        return dict(self._before)

    def _found(self) -> dict:
        """A batch of one sample, where nothing can be learned from the first of all batches."""
        faults, data = list(self._faults), cast(Any, self.train_dataset)
        searched = data is not None and not isinstance(data, IterableDataset)
        for number in range(min(len(data), _SEARCHED) if searched else 0):
            more, usable = _parted(self.data_collator([data[number]]))
            if usable:
                return self._prepare_inputs(usable)
            faults += more
        raise UnsupportedInputError(f"nothing can be learned from these data: {listed(faults)}")

    def prediction_step(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> tuple[Tensor, None, None]:
        """The loss of a batch in evaluation, also without labels; what it is made of is noted."""
        faults, usable = _parted(inputs)
        # one that nothing can be learned from runs another, which does not count, so that all devices keep step
        batch = self._prepare_inputs(usable or self._before or self._found())
        with torch.no_grad(), self.compute_loss_context_manager():
            out = model(**batch)
        sums = torch.stack([out.task_loss.float() * out.targets, out.targets, out.kept_tokens, out.tokens])
        self._evaluated.append(torch.cat([sums * (usable is not None), sums.new_tensor([len(faults)])]))
        return out.loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Adds the losses of the data set as a whole, as of one batch."""
        self._evaluated.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        task, targets, kept, tokens, skipped = self.accelerator.reduce(
            torch.stack(self._evaluated).double().sum(dim=0), "sum"
        ).tolist()
        gated = self._gated()
        if not tokens:
            raise UnsupportedInputError("nothing can be learned from any sample of the evaluation's data")
        found = {"task_loss": task / targets, "kept": kept / tokens, "skipped": int(skipped)}
        found["budget_loss"] = gated.weight * (found["kept"] - gated.tau) ** 2
        found["loss"] = found["task_loss"] + found["budget_loss"]
        cast(dict, output.metrics).update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds to training's logs what was noted since the last of them."""
        if "loss" in logs and self._noted:
            *sums, steps = self.accelerator.reduce(torch.stack(self._noted).sum(dim=0), "mean").tolist()
            self._noted.clear()
            logs.update({name: value / steps for name, value in zip(LOGGED, sums, strict=True)})
        if "loss" in logs or "train_loss" in logs:
            new = torch.tensor(len(self._faults) - self._counted, device=self.args.device)
            self._counted = len(self._faults)
            logs["skipped"] = self.skipped + int(self.accelerator.reduce(new, "sum"))
            if "train_loss" in logs and logs["skipped"] and self.is_world_process_zero():
                names = f", here {listed(self._faults)}" if self._faults else ""
                warnings.warn(f"{logs['skipped']} samples were left out of training{names}", stacklevel=2)
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, which under FSDP would gather the base model, or save nothing."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The pruner's files, and LoRA's below them; never the base model. Every process of a sharded model calls."""
        folder, gated = Path(output_dir or str(self.args.output_dir)), self._gated()
        weights = {name: _whole(x) for name, x in gated.pruner.state_dict().items()}
        lora = None
        if gated.has_lora and any(isinstance(x, DTensor) for x in gated.model.parameters()):
            trained = {name for name, x in gated.model.named_parameters() if x.requires_grad}
            lora = {name: _whole(x) for name, x in gated.model.state_dict().items() if name in trained}
        if not self.args.should_save:
            return
        own = gated.pruner
        plain = LearnablePruner(own.hidden_size, own.intermediate_size, **{name: getattr(own, name) for name in FACTS})
        plain.to(own.fc1.weight.dtype).load_state_dict(weights)
        plain.save_pretrained(folder)
        if gated.has_lora:
            gated.model.save_pretrained(str(folder / LORA_FOLDER), state_dict=lora)  # type: ignore[operator]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As Trainer's, which under FSDP would write the base model as well."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """What `_save` wrote."""
        folder, gated = Path(resume_from_checkpoint), self._gated()
        own = gated.pruner.state_dict()
        weights = load_file(folder / WEIGHTS_FILE)
        gated.pruner.load_state_dict({name: _laid_like(own[name], x) for name, x in weights.items()})
        if gated.has_lora:
            from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

            own = get_peft_model_state_dict(gated.model)
            lora = load_peft_weights(str(folder / LORA_FOLDER), device="cpu")
            set_peft_model_state_dict(gated.model, {name: _laid_like(own[name], x) for name, x in lora.items()})

    def _load_best_model(self) -> None:
        """As `_load_from_checkpoint`: Trainer would look for the whole model's weights."""
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _gated(self) -> GatedModel:
        gated = self.accelerator.unwrap_model(self.model)
        assert isinstance(gated, GatedModel)  # as given to the constructor
        return gated


def _parted(batch: dict) -> tuple[list[str], dict | None]:
    """The samples left out of a batch, and the model's inputs; None if nothing can be learned from them."""
    inputs = dict(batch)
    faults, labels = list(inputs.pop("skipped", ())), inputs.get("labels")
    if labels is not None and not (labels[:, 1:] != IGNORED).any():
        return [*faults, *["a sample without a label"] * len(labels)], None
    return faults, inputs or None


def _whole(x: Tensor) -> Tensor:
    """A tensor that FSDP2 may have sharded, gathered by all processes together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _laid_like(own: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, sharded if `own` is."""
    return (
        distribute_tensor(whole.to(own.device), own.device_mesh, own.placements) if isinstance(own, DTensor) else whole
    )
