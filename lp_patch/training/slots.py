"""Training slots to rebuild the tokens (OC-VTP, arXiv 2511.20439): no language model takes part."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..early import tokens_given
from ..registry import find_parts
from ..settings import readings
from ..slots import SlotPruner, received_weights
from ..strategies import SCORERS


@torch.no_grad()
def early_tokens(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """The tokens (B, N, C) that "oc-vtp" reads of B pictures, or tiles of pictures.

    Raises:
        ConfigError: the family has no [CLS] that ranks its tokens one to one, or too few vision layers.
    """
    parts = find_parts(model)
    ((module, _),) = readings(parts, SCORERS[SlotPruner.kind])
    found: list[Tensor] = []
    hook = module.register_forward_pre_hook(partial(_note, found), with_kwargs=True)
    try:
        parts.model.get_image_features(pixel_values)  # type: ignore[operator]
    finally:
        hook.remove()
    return torch.cat(found)


def _note(found: list[Tensor], module: nn.Module, args: tuple, kwargs: dict) -> None:
    found.append(tokens_given(args, kwargs))


class SlotTraining(nn.Module):
    """A SlotPruner with a decoder, which is needed in training alone.

    Each token is rebuilt as the mixture of its slots' guesses by the shares that they hold of it; a slot's guess is
    linear in it (ours).
    """

    def __init__(self, pruner: SlotPruner) -> None:
        super().__init__()
        self.pruner = pruner
        self.decoder = nn.Linear(pruner.slot_size, pruner.hidden_size)

    def forward(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """The loss () of tokens (B, N, C) and slots that start at noise (K, D), both of the module's dtype."""
        shares, slots = self.pruner(tokens, noise)
        target = nn.functional.layer_norm(tokens, tokens.shape[-1:])
        return area_weighted_error(shares, shares.transpose(1, 2) @ self.decoder(slots), target)


def area_weighted_error(shares: Tensor, guess: Tensor, target: Tensor) -> Tensor:
    """The mean over slots of the mean squared error over what each holds: a small part counts as much as the sky.

    Args:
        shares: (B, K, N), of each token that each slot holds; no gradient passes, or slots would flee from errors.
        guess: (B, N, C).
        target: (B, N, C).

    Returns:
        ().
    """
    error = (guess - target).square().mean(dim=2)
    return (received_weights(shares.detach()) @ error[:, :, None]).mean()


def new_slots(width: int, **facts: Any) -> SlotPruner:
    """A SlotPruner to train on tokens of this width, with the paper's proportions: 2 C hidden, slots of C / 2."""
    return SlotPruner(width, 2 * width, max(1, width // 2), **facts)
