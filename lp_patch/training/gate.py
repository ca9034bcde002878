"""The gate: a frozen, stock model in which visual tokens count as much as a pruner says (LearnPruner, section 3).

The sequence keeps its length. The pruner reads the features that it will read when it prunes, its decisions are carried
to their places in the prompt, and `gated_attention` takes the place of every decoder layer's attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from ..attention import KEY, Attended, check_tappable, install_tap
from ..compat import cache_in, checkpoint_layers
from ..errors import ConfigError, PrunerError, UnsupportedInputError, UnsupportedModelError
from ..install import Installation, forget_compiled
from ..pruner import LearnablePruner, resolve_pruner
from ..read import Chosen, Reader, State, chosen_of
from ..registry import Parts, find_parts
from .attention import gated_attention
from .data import IGNORED, listed


def straight_through(logits: Tensor) -> Tensor:
    """(..., 2) logits (drop, keep) -> (...) float32: the hard decision, 0 or 1, with the soft one's gradient.

    ``M = M_soft + stopgrad(M_hard - M_soft)``, summed so that M is exactly 0 or 1. A tie drops.
    """
    soft = logits.float().softmax(dim=-1)[..., 1]
    return (soft > 0.5).float() + (soft - soft.detach())


class Gate(Reader):
    """Hooks that put a pruner's decisions on every attention layer.

    Attributes:
        mask: (V,) decisions on the visual tokens of the latest forward, row by row; with gradient.
        visual: (B, S) bool, where they stand.
        on: whether the gate takes part; off, the model is as it was.
    """

    def __init__(self, parts: Parts, pruner: LearnablePruner, difference: bool) -> None:
        super().__init__(parts, State())
        self.pruner = pruner
        self.difference = difference
        self.on = True
        self.mask: Tensor | None = None
        self.visual: Tensor | None = None
        if not parts.kinds.plain:
            raise UnsupportedModelError(
                f"a pruner cannot be trained on {parts.adapter.family} with this language model, whose layers have "
                "windows, or a state in the place of keys: the gate needs layers that look at all tokens before them"
            )
        for number, attention in enumerate(parts.attention):
            check_tappable(attention, f"the attention of decoder layer {number}")

    def install(self, on: Installation) -> None:
        """Put the hooks on the model."""
        super().install(on)
        if self.parts.projector is not None:
            on.before(self.parts.projector, self.before_projector)
        on.before(self.parts.language_model, self.before_language_model)
        for attention in self.parts.attention:
            on.note(install_tap(attention, self.attention))

    def before_projector(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Decide on (F, N, C) encoder features, or on all images in one row, where the projector works by token."""
        encoding = self._call().encoding
        if encoding is not None and self.on:
            decisions = straight_through(self._logits(args[0]))
            images = decisions if encoding.sizes is None else decisions.flatten().split(encoding.sizes)
            encoding.chosen += [Chosen(None, x) for x in images]
            encoding.present += [len(x) for x in images]

    def _logits(self, features: Tensor) -> Tensor:
        """(..., C) -> (..., 2); the features take no gradient."""
        weight = self.pruner.fc1.weight
        return self.pruner(features.detach().to(weight.device, weight.dtype))

    def before_language_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Carry the decisions to their places in the prompt, and with the forward to its attention layers."""
        self.mask = self.visual = None
        embeds = kwargs.get("inputs_embeds")
        call = self.take_call(embeds)
        if not self.on:
            return None
        if embeds is None or not call.features:
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
        modalities = [m for m in self.parts.modalities if m.name in call.features]
        masks = [self.placeholders(call, m.placeholder).to(embeds.device) & real for m in modalities]
        visual = torch.stack(masks).any(dim=0)
        structural = self.structural(embeds, visual)
        if structural is not None:
            visual = visual & ~structural
        if self.parts.projector is None:
            decisions = straight_through(self._logits(embeds[visual]))
        else:
            decisions = self._carried([x for m in modalities for x in call.features[m.name]])
        self.visual, self.mask = visual, decisions.to(embeds.device)
        if len(self.mask) != int(visual.sum()):
            raise UnsupportedInputError(
                f"{len(self.mask)} encoded visual tokens do not fill the prompt's {int(visual.sum())} one by one"
            )
        return args, {**kwargs, KEY: real.float().masked_scatter(visual, self.mask)}

    @staticmethod
    def _carried(features: list[Tensor]) -> Tensor:
        """The decisions (V,) that travelled with the features."""
        decisions = [chosen_of(feature).scores for feature in features]
        if any(x is None for x in decisions):
            raise UnsupportedInputError("these features were encoded outside this forward: pass pixel_values")
        return torch.cat(decisions)  # type: ignore[arg-type]

    def attention(self, gate: Tensor | None, seen: Attended) -> Tensor | None:
        """Every decoder layer's attention under the forward's gate (B, L); None: the layer's own."""
        if gate is None:
            return None
        query, key, value = seen.query, seen.key, seen.value
        gate = gate.to(query.device)
        return gated_attention(query, key, value, gate, scaling=seen.scaling, difference=self.difference)


@dataclass
class GatedOutput(ModelOutput):
    """What a forward of `GatedModel` returns: scalars, but for `earlier`; `loss` and `kept_tokens` carry gradients.

    Attributes:
        loss: to be minimised: task_loss + budget_loss, or task_loss alone where more parts of the step follow.
        task_loss: mean over `targets` positions, or their share of a larger mean.
        budget_loss: ``weight * (kept - tau) ** 2``.
        kept: share of the visual tokens that are kept, of all the step's parts so far.
        targets: how many positions this forward's task counts.
        kept_tokens: how many these are.
        tokens: of how many.
        earlier: (2 + P,) for the step's next part: kept tokens, all tokens, and the gradient of the first for each of
            the pruner's P weights that train.
    """

    loss: Tensor | None = None
    task_loss: Tensor | None = None
    budget_loss: Tensor | None = None
    kept: Tensor | None = None
    targets: Tensor | None = None
    kept_tokens: Tensor | None = None
    tokens: Tensor | None = None
    earlier: Tensor | None = None


class GatedModel(nn.Module):
    """A frozen model and a pruner in training: `forward` takes the model's inputs and returns the pruner's loss.

    ``loss = task + weight * (kept - tau) ** 2``, kept being the share of the batch's visual tokens that stay open.
    The task is "ntp", next-token prediction of the labels (LearnPruner, section 3), or "distill" (ours): the
    divergence from what the same model says with all its visual tokens, at the labels' positions or, without labels,
    at all text after the last image. Rows without a label, where others have some, take no part: alone, the budget
    would only close their tokens.

    The batch is an optimizer step's, as in the paper. The square of its mean is not the mean of its parts' squares, so
    a step in parts says so, and gets the gradient that it would get whole (but for "distill" without labels, whose
    parts count alike, however many positions they have). `PrunerTrainer` does it, over all devices; in a loop::

        earlier, items = None, sum((part["labels"][:, 1:] != -100).sum() for part in parts)
        for number, part in enumerate(parts, 1):
            out = gated(**part, num_items_in_batch=items, part=number < len(parts), earlier=earlier)
            out.loss.backward()
            earlier = out.earlier

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

    accepts_loss_kwargs = True  # for Trainer: it hands in num_items_in_batch, and
    loss_type = "ForCausalLM"  # does not count a row's first label, which nothing predicts

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
        if objective == "distill" and parts.adapter.merge is not None:
            raise ConfigError(f'{parts.adapter.family} grows its prompts, so labels do not lie on logits: use "ntp"')
        self.model = model
        found = resolve_pruner(pruner, parts.width, parts.model.config) or new_pruner(parts.width)
        if not isinstance(found, LearnablePruner):
            raise PrunerError(f"a gate is a LearnablePruner's, got {type(found).__name__}, weights of {found.kind!r}")
        self.pruner = found
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

    def forward(
        self,
        labels: Tensor | None = None,
        *,
        num_items_in_batch: Tensor | int | None = None,
        part: bool = False,
        earlier: Tensor | None = None,
        skipped: Sequence[str] = (),
        **inputs: Any,
    ) -> GatedOutput:
        """The losses of a batch, or of a part of an optimizer step's.

        Args:
            labels: (B, S) int64 with -100 where nothing is to be learned; at least one row has others.
            num_items_in_batch: positions of the whole step, to divide their summed loss by; None: those of this batch.
            part: more parts of the same step follow: `loss` leaves the budget to the last of them.
            earlier: `earlier` of the output of the part before.
            skipped: what `ConversationCollator` left out of the batch.
            inputs: of the model.

        Raises:
            UnsupportedInputError: nothing can be learned from this batch, or the gate cannot follow it.
        """
        if not inputs:
            raise UnsupportedInputError(f"no sample of this batch can be learned from: {listed(skipped)}")
        if labels is None and self.objective == "ntp":
            raise UnsupportedInputError('objective="ntp" needs labels; "distill" does without')
        if labels is not None and not (labels[:, 1:] != IGNORED).any():
            raise UnsupportedInputError(
                f"every label of this batch is {IGNORED}, so nothing can be learned from it: leave it out (was it cut?)"
            )
        distill = self.objective == "distill"
        if distill:
            with torch.no_grad(), self.opened():
                teacher = self.model(**inputs, use_cache=False).logits
        out = self.model(**inputs, labels=None if distill else labels, use_cache=False)
        asked = self._asked(labels, inputs)
        task, targets = divergence(out.logits, teacher, asked) if distill else out.loss, asked.sum()
        if num_items_in_batch is not None:
            task = task * (targets / num_items_in_batch)
        kept_tokens, tokens = self._counted(labels, earlier)
        kept = kept_tokens / tokens
        budget = self.weight * (kept - self.tau) ** 2
        return GatedOutput(
            loss=task if part else task + budget,
            task_loss=task.detach(),
            budget_loss=budget.detach(),
            kept=kept.detach(),
            targets=targets,
            kept_tokens=kept_tokens,
            tokens=tokens,
            earlier=self._handed_on(kept_tokens, tokens) if part else None,
        )

    def _counted(self, labels: Tensor | None, earlier: Tensor | None) -> tuple[Tensor, Tensor]:
        """Kept tokens, with their gradient, and all tokens: of rows with a label, and of the parts before."""
        mask, visual = self._gate.mask, self._gate.visual
        assert mask is not None and visual is not None  # the forward has seen images, or raised
        if labels is not None:
            taught = (labels[:, 1:] != IGNORED).any(dim=1).to(visual.device)
            mask = mask[taught[visual.nonzero()[:, 0]]]
        kept_tokens, tokens = mask.sum(), mask.new_tensor(len(mask))
        if earlier is not None:
            earlier = earlier.to(mask.device)
            kept_tokens, tokens = kept_tokens + earlier[0], tokens + earlier[1]
            if weights := self._weights():
                # zero, with the gradient of the parts before
                vector = parameters_to_vector(weights).to(earlier)
                kept_tokens = kept_tokens + (vector - vector.detach()) @ earlier[2:]
        return kept_tokens, tokens

    def _handed_on(self, kept_tokens: Tensor, tokens: Tensor) -> Tensor:
        """What the step's next part needs to know: (2 + P,)."""
        counts = torch.stack([kept_tokens.detach(), tokens])
        if not (weights := self._weights()):
            return counts
        # through the pruner alone, whose graph the loss goes through once more
        slopes = torch.autograd.grad(kept_tokens, weights, retain_graph=True)
        return torch.cat([counts, parameters_to_vector(slopes).to(counts.device)])

    def _weights(self) -> list[nn.Parameter]:
        """The pruner's weights that train."""
        return [weight for weight in self.pruner.parameters() if weight.requires_grad]

    def _asked(self, labels: Tensor | None, inputs: dict) -> Tensor:
        """(B, S) bool: positions whose next token is to be distilled."""
        if labels is not None:
            return nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))
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
