"""SlotPruner: slot attention over an early layer of the vision encoder (OC-VTP, arXiv 2511.20439)."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .pruner import Pruner

STEPS = 3  # as the paper
_EPSILON = 1e-8


class SlotPruner(Pruner):
    """Slots that compete for the tokens of a picture, so that each comes to stand for one part of it (OC-VTP).

    ``LayerNorm -> Linear -> GELU -> Linear`` makes tokens, 3 rounds of slot attention with a GRU make slots. Sizes at
    CLIP's width are the paper's, 1024 -> 2048 -> 512. Ours: where slots start is drawn once by a seed, from a learned
    normal distribution, so that every picture, in every batch, starts from the same slots; and no MLP follows the GRU.

    Args:
        hidden_size: width C of the tokens that it reads.
        intermediate_size: width of the hidden layer.
        slot_size: width D of a slot.
        facts: what is known of the weights, see `lp_patch.pruner.Pruner`.
    """

    kind = "oc-vtp"
    sizes = ("hidden_size", "intermediate_size", "slot_size")
    about = (
        "(after OC-VTP, arXiv 2511.20439, trained without the language model): slots compete for\nthe "
        "{hidden_size}-wide tokens of an early layer of the vision encoder, and each keeps the one that it holds most "
        "of."
    )
    slot_size: int

    def __init__(self, hidden_size: int, intermediate_size: int = 2048, slot_size: int = 512, **facts: Any) -> None:
        sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "slot_size": slot_size}
        super().__init__(sizes, **facts)
        self.norm = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(intermediate_size, slot_size)
        self.mean = nn.Parameter(torch.zeros(slot_size))
        self.deviation = nn.Parameter(torch.ones(slot_size))
        self.norm_slots = nn.LayerNorm(slot_size)
        self.query, self.key, self.value = (nn.Linear(slot_size, slot_size, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(slot_size, slot_size)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Let slots compete.

        Args:
            x: (B, N, C), in the module's dtype.
            noise: (K, D) standard normal, where the slots start.

        Returns:
            (B, K, N): the share of each token that each slot holds, which sums to 1 over the slots; and (B, K, D), the
            slots.
        """
        tokens = self.fc2(self.act(self.fc1(self.norm(x))))
        key, value = self.key(tokens) * self.slot_size**-0.5, self.value(tokens)
        slots = (self.mean + self.deviation * noise).expand(len(x), -1, -1)
        for _ in range(STEPS):
            shares = (self.query(self.norm_slots(slots)) @ key.transpose(1, 2)).softmax(dim=1)
            found = received_weights(shares) @ value
            slots = self.gru(found.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return shares, slots

    def compete(self, x: Tensor, count: int, seed: int) -> Tensor:
        """The shares (B, count, N), in the module's dtype, of tokens x (B, N, C), any float dtype and device."""
        self.follow(x)
        own = self.fc1.weight.dtype
        noise = start_noise(count, self.slot_size, seed, x.device).to(own)
        with torch.autocast(x.device.type, enabled=False):
            # row by row: rounding, which differs by the size of a batch, would grow in each round
            return torch.cat([self(row[None].to(own), noise)[0] for row in x])


def received_weights(shares: Tensor) -> Tensor:
    """How much of a slot each token is: shares (B, K, N) -> (B, K, N), which sum to 1 over the tokens."""
    held = shares + _EPSILON
    return held / held.sum(dim=2, keepdim=True)


@functools.cache  # for good: captured graphs read it
def start_noise(count: int, size: int, seed: int, device: torch.device) -> Tensor:
    """(count, size) float32, the same on every device: drawn on the host, and uploaded once."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, size, generator=generator, dtype=torch.float32, device="cpu").to(device)
