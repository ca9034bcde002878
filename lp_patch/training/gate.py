"""The gate: a frozen, stock model in which visual tokens count as much as a pruner says (LearnPruner, section 3).

The sequence keeps its length. The pruner reads the features that it will read when it prunes, its decisions are carried
to their places in the prompt, and `gated_attention` takes the place of every decoder layer's attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from ..attention import check_tappable, install_attention
from ..compat import cache_in, checkpoint_layers
from ..errors import ConfigError, UnsupportedInputError
from ..install import Installation, forget_compiled
from ..pruner import LearnablePruner, resolve_pruner
from ..registry import Parts, find_parts
from ..vision import FEATURE_SCORES, State, Vision
from .attention import gated_attention


def straight_through(logits: Tensor) -> Tensor:
    """(..., 2) logits (drop, keep) -> (...) float32: the hard decision, 0 or 1, with the soft one's gradient.

    ``M = M_soft + stopgrad(M_hard - M_soft)``, summed so that M is exactly 0 or 1. A tie drops.
    """
    soft = logits.float().softmax(dim=-1)[..., 1]
    return (soft > 0.5).float() + (soft - soft.detach())


class Gate(Vision):
    """Hooks that put a pruner's decisions on every attention layer.

    Attributes:
        mask: (V,) decisions on the visual tokens of the latest forward, row by row; with gradient.
        on: whether the gate takes part; off, the model is as it was.
    """

    def __init__(self, parts: Parts, pruner: LearnablePruner, difference: bool) -> None:
        super().__init__(parts, State())
        self.pruner = pruner
        self.difference = difference
        self.on = True
        self.mask: Tensor | None = None
        self.visual: Tensor | None = None
        self._gate: Tensor | None = None
        for number, attention in enumerate(parts.attention):
            check_tappable(attention, f"the attention of decoder layer {number}")

    def install(self, on: Installation) -> None:
        """Put the hooks on the model."""
        super().install(on)
        if self.parts.projector is not None:
            on.before(self.parts.projector, self.before_projector)
        on.before(self.parts.language_model, self.before_language_model)
        for attention in self.parts.attention:
            on.note(install_attention(attention, self.attention))

    def before_projector(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Decide on (F, N, C) encoder features, where the projector works token by token."""
        encoding = self._shown().encoding
        if encoding is not None and self.on:
            encoding.scores += list(straight_through(self._logits(args[0])))

    def _logits(self, features: Tensor) -> Tensor:
        """(..., C) -> (..., 2); the features take no gradient."""
        weight = self.pruner.fc1.weight
        return self.pruner(features.detach().to(weight.device, weight.dtype))

    def before_language_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Carry the decisions to their places in the prompt."""
        self.mask = self._gate = self.visual = None
        embeds = kwargs.get("inputs_embeds")
        shown = self._take_shown(embeds)
        if not self.on:
            return
        if embeds is None or not shown.features:
            raise UnsupportedInputError(
                "no visual features passed this forward: a pruner can be trained on samples with images alone"
            )
        attention_mask = kwargs.get("attention_mask")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise UnsupportedInputError(
                f"training needs the 2-D attention mask (batch, tokens), got {tuple(attention_mask.shape)}"
            )
        if (cache := cache_in(kwargs)) is not None and cache.get_seq_length() > 0:
            raise UnsupportedInputError("training needs whole prompts in one forward, got a cache that holds tokens")
        real = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        if attention_mask is not None:
            real = attention_mask.bool().to(embeds.device)
        prompt = self._prompt(shown, embeds, real)
        if self.parts.projector is None:
            decisions = straight_through(self._logits(embeds[prompt.visual]))
        else:
            decisions = self._carried([x for m in prompt.modalities for x in shown.features[m.name]])
        self.visual, self.mask = prompt.visual, decisions.to(embeds.device)
        if len(self.mask) != int(prompt.visual.sum()):
            raise UnsupportedInputError(
                f"{len(self.mask)} encoded visual tokens do not fill the prompt's {int(prompt.visual.sum())} one by one"
            )
        self._gate = real.float().masked_scatter(prompt.visual, self.mask)

    @staticmethod
    def _carried(features: list[Tensor]) -> Tensor:
        """The decisions (V,) that travelled with the features."""
        decisions = [getattr(feature, FEATURE_SCORES, None) for feature in features]
        if any(x is None for x in decisions):
            raise UnsupportedInputError("these features were encoded outside this forward: pass pixel_values")
        return torch.cat(decisions)  # type: ignore[arg-type]

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor | None:
        """Every decoder layer's attention; None: the layer's own."""
        if self._gate is None:
            return None
        return gated_attention(
            query, key, value, self._gate.to(query.device), scaling=scaling, difference=self.difference
        )


class GatedModel(nn.Module):
    """A frozen model and a pruner in training: `forward` takes the model's inputs and returns the pruner's loss.

    ``loss = task + weight * (kept - tau) ** 2``, kept being the share of the batch's visual tokens that stay open.
    The task is "ntp", next-token prediction of the labels (LearnPruner, section 3), or "distill" (ours): the
    divergence from what the same model says with all its visual tokens, at the labels' positions or, without labels,
    at all text after the last image.

    Args:
        model: a supported model, unpatched, all of its parameters frozen; or inside PEFT, whose parameters train too.
        pruner: of the model's width, or None for a new one.
        objective: "ntp" or "distill".
        weight: of the budget term.
        tau: the share of tokens to keep that costs nothing.
        difference: what the gate's gradient is, see `gated_attention`.

    Raises:
        ConfigError: an option out of range, a model that is patched, or one that is not frozen.
        UnsupportedModelError: no adapter fits.
        PrunerError: the pruner reads another width.
    """

    accepts_loss_kwargs = False  # for Trainer: the loss is a mean, to be divided by accumulation steps

    def __init__(
        self,
        model: nn.Module,
        pruner: LearnablePruner | None = None,
        *,
        objective: str = "ntp",
        weight: float = 1.0,
        tau: float = 0.0,
        difference: bool = False,
    ) -> None:
        super().__init__()
        if objective not in ("ntp", "distill"):
            raise ConfigError(f'objective must be "ntp" or "distill", got {objective!r}')
        if not 0 <= tau <= 1 or weight < 0:
            raise ConfigError(f"tau must lie in [0, 1] and weight be >= 0, got tau={tau!r}, weight={weight!r}")
        if not hasattr(model, "peft_config") and any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("the base model would train as well: freeze it with model.requires_grad_(False)")
        parts = find_parts(model)
        self.model = model
        self.pruner = resolve_pruner(pruner, parts.width, parts.model.config) or new_pruner(parts.width)
        self.objective, self.weight, self.tau = objective, weight, tau
        self.config = parts.model.config
        self._gate = Gate(parts, self.pruner, difference)
        self._installation = Installation()
        self._gate.install(self._installation)
        forget_compiled(parts.model)

    @property
    def has_lora(self) -> bool:
        """Whether the model is wrapped by PEFT."""
        return hasattr(self.model, "peft_config")

    def remove(self) -> None:
        """Take the gate off the model, bit for bit."""
        self._installation.remove()
        forget_compiled(self._gate.parts.model)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The model as it was given: without the gate, without LoRA."""
        self._gate.on = False
        try:
            with self.model.disable_adapter() if self.has_lora else nullcontext():  # type: ignore[operator]
                yield
        finally:
            self._gate.on = True

    def train(self, mode: bool = True) -> "GatedModel":
        """The frozen model stays in evaluation mode; only what checkpoints its layers hears of training."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            self.model.eval()
            for module in self.model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = mode
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **options: Any
    ) -> None:
        """As on a transformers model, for Trainer; only the non-reentrant kind carries the gate's gradient."""
        kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"]:
            raise ConfigError("use_reentrant=True would lose the gate's gradient: leave it out")
        checkpoint_layers(self.model, kwargs, **options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **options: Any) -> None:
        """Its name before transformers 5.18."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> ModelOutput:
        """Inputs of the model, `labels` (B, S) int64 with -100 where nothing is to be learned.

        Returns:
            loss, task_loss, budget_loss: scalars; kept: scalar, the share of visual tokens kept.
        """
        if self.objective == "ntp":
            if labels is None:
                raise UnsupportedInputError('objective="ntp" needs labels; "distill" does without')
            task = self.model(**inputs, labels=labels, use_cache=False).loss
        else:
            with torch.no_grad(), self.opened():
                teacher = self.model(**inputs, use_cache=False).logits
            student = self.model(**inputs, use_cache=False).logits
            task = divergence(student, teacher, self._asked(labels, inputs))
        assert self._gate.mask is not None  # the forward has seen images, or raised
        kept = self._gate.mask.mean()
        budget = self.weight * (kept - self.tau) ** 2
        return ModelOutput(loss=task + budget, task_loss=task.detach(), budget_loss=budget.detach(), kept=kept.detach())

    def _asked(self, labels: Tensor | None, inputs: dict) -> Tensor:
        """(B, S) bool: positions whose next token is to be distilled."""
        if labels is not None:
            return nn.functional.pad(labels[:, 1:] != -100, (0, 1))
        visual = self._gate.visual
        assert visual is not None  # as above
        after = visual.flip(1).cumsum(dim=1).flip(1) == 0
        mask = inputs.get("attention_mask")
        return after if mask is None else after & mask.bool().to(after.device)


def divergence(student: Tensor, teacher: Tensor, where: Tensor) -> Tensor:
    """Mean KL(teacher || student) in float32 over the positions `where` (B, S) bool of logits (B, S, V)."""
    if not where.any():
        raise UnsupportedInputError("no position to distill: every label is -100")
    where = where.to(student.device)
    own, other = student[where].float().log_softmax(-1), teacher[where].float().log_softmax(-1)
    return nn.functional.kl_div(own, other, log_target=True, reduction="batchmean")


def new_pruner(width: int, intermediate_size: int = 512, keep_bias: float = 2.0) -> LearnablePruner:
    """A pruner to train, which keeps nearly everything at first: a token that was never kept teaches nothing (ours)."""
    pruner = LearnablePruner(width, intermediate_size)
    with torch.no_grad():
        pruner.fc2.bias.copy_(torch.tensor([0.0, keep_bias]))
    return pruner
