"""A short training loop for small modules: AdamW, one cosine, a loss that must stay finite."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import UnsupportedInputError

CLIP = 1.0  # largest norm of a step's gradient (ours)


def fit(
    module: nn.Module,
    losses: Callable[[int], tuple[Tensor, dict[str, float]]],
    steps: int,
    learning_rate: float = 1e-3,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Train the weights of `module` that require a gradient.

    Args:
        losses: from the number of a step to its loss (), with gradient, and what to report of it.
        steps: updates; the learning rate falls to 0 over them, as half a cosine.
        learning_rate: at the start.
        report: is told the number of each step and what `losses` said of it.

    Raises:
        UnsupportedInputError: a loss is not finite.
    """
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        loss, about = losses(step)
        if not loss.isfinite():
            raise UnsupportedInputError(
                f"the loss of step {step} is {loss.item()}: a step with it would ruin the weights. Lower the learning "
                "rate, or use another precision"
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step, about)
