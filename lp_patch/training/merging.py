"""Training mixtures of tokens (MetaCompress, arXiv 2603.21701): so that a frozen model answers as with all tokens.

What trains is the patched model's own forward: weights in training mode get the gradient of what becomes of the
mixtures.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedInputError
from ..merging import MergingPruner
from ..patch import applied
from .data import IGNORED
from .gate import divergence


class MergingOutput(NamedTuple):
    """What a forward of `MergingTraining` returns, scalars: `loss`, with gradient, and the three that it sums."""

    loss: Tensor
    divergence: Tensor
    entropy: Tensor
    column: Tensor


class MergingTraining(nn.Module):
    """A frozen model and the weights by which its visual tokens are mixed.

    ``loss = KL(full || merged) + entropy * mean row entropy of P + column * max column sum of P``: the first at the
    positions that predict an answer's tokens, the second asks for mixtures of few tokens, the third for few mixtures
    with the same one. Stage 2 is off.

    Args:
        model: a supported model, unpatched, all of its parameters frozen.
        pruner: of the model's width.
        entropy: factor of the second term (paper: 1).
        column: of the third (paper: 1).

    Raises:
        ConfigError: a model that is not frozen.
    """

    def __init__(self, model: nn.Module, pruner: MergingPruner, *, entropy: float = 1.0, column: float = 1.0) -> None:
        super().__init__()
        if any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("the base model would train as well: freeze it with model.requires_grad_(False)")
        self.model = model
        self.pruner = pruner
        self.entropy, self.column = entropy, column

    def train(self, mode: bool = True) -> "MergingTraining":
        """The frozen model stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    @torch.no_grad()
    def full_logits(self, labels: Tensor, **inputs: Any) -> Tensor:
        """What the model says with all of its tokens where the T labels are to be predicted: (T, V)."""
        return self.model(**inputs, use_cache=False).logits[_before(labels)]

    def forward(self, labels: Tensor, tokens: int, full: Tensor | None = None, **inputs: Any) -> MergingOutput:
        """The losses of a batch.

        Args:
            labels: (B, S) int64, -100 where nothing is to be learned.
            tokens: mixtures of each picture.
            full: (T, V), `full_logits` of this batch, for whoever comes back to it; None: they are computed.
            inputs: of the model, pictures among them.

        Raises:
            UnsupportedInputError: no label, or no picture with more tokens than `tokens`.
        """
        full = self.full_logits(labels, **inputs) if full is None else full
        found: list[Tensor] = []
        hook = self.pruner.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            with applied(self.model, tokens=tokens, stage_ratio=1, scorer=MergingPruner.kind, pruner=self.pruner):
                own = self.model(**inputs, use_cache=False).logits[_before(labels)]
        finally:
            hook.remove()
        if not found:
            raise UnsupportedInputError(f"no picture of this batch has more than {tokens} tokens: nothing is mixed")
        task = divergence(own, full, torch.ones(len(own), dtype=torch.bool, device=own.device))
        rows = torch.cat([row_entropy(weights) for weights in found]).mean()
        columns = torch.cat([largest_column(weights) for weights in found]).mean()
        loss = task + self.entropy * rows + self.column * columns
        return MergingOutput(loss, task.detach(), rows.detach(), columns.detach())


def _before(labels: Tensor) -> Tensor:
    """(B, S) bool: positions that predict a label of labels (B, S)."""
    return nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))


def row_entropy(weights: Tensor) -> Tensor:
    """P (B, M, N) -> (B,): the mean entropy of its rows, in nats."""
    return torch.special.entr(weights).sum(dim=2).mean(dim=1)


def largest_column(weights: Tensor) -> Tensor:
    """P (B, M, N) -> (B,): the largest sum of a column, how much of the mixtures one token makes up."""
    return weights.sum(dim=1).amax(dim=1)
