"""How much a prefill was shortened, in tokens, arithmetic and cache bytes."""

from dataclasses import dataclass
from itertools import groupby
from statistics import fmean
from typing import Any

from torch import nn

from .trace import Trace


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer's prefill, summed over the batch, as it ran and as it would have run unpruned.

    `flops` counts 2 per multiply-add of every linear layer and of causal attention (half the square); softmax, norms
    and rotary embedding are left out.
    """

    layer: int
    stage: str
    visual_tokens: float
    flops: float
    full_flops: float
    kv_bytes: int
    full_kv_bytes: int


@dataclass(frozen=True)
class Report:
    """Costs of the latest prefill; `str()` is a table. `layers` is empty before the first one."""

    trace: Trace | None
    layers: list[LayerCost]

    @property
    def flops_ratio(self) -> float:
        """Decoder arithmetic of the prefill, pruned over unpruned."""
        return sum(x.flops for x in self.layers) / sum(x.full_flops for x in self.layers)

    @property
    def kv_ratio(self) -> float:
        """KV-cache bytes after the prefill, pruned over unpruned."""
        return sum(x.kv_bytes for x in self.layers) / sum(x.full_kv_bytes for x in self.layers)

    def __str__(self) -> str:
        if self.trace is None:
            return "lp_patch: no prefill yet"
        t = self.trace
        visual, text = sum(t.visual_tokens), sum(t.text_tokens)
        if visual == 0:
            return (
                f"lp_patch: no visual tokens in the latest prefill ({len(t.visual_tokens)} prompts, {text} text tokens)"
            )
        average = sum(fmean(layers) for layers in t.tokens_per_layer)
        lines = [
            f"lp_patch: {len(t.visual_tokens)} prompts, {visual} of {visual + text} tokens visual "
            f"({visual / (visual + text):.0%}); {average:.1f} visual tokens kept on average over the layers "
            f"({average / visual:.1%})",
            f"{'layers':>9} {'stage':>9} {'visual':>9} {'GFLOP':>10} {'unpruned':>10} {'KV KiB':>10} {'unpruned':>10}",
        ]
        for _, group in groupby(self.layers, key=lambda x: (x.stage, x.visual_tokens)):
            rows = list(group)
            lines.append(
                f"{rows[0].layer + 1:>4}-{rows[-1].layer + 1:<4} {rows[0].stage:>9} {rows[0].visual_tokens:>9.0f} "
                f"{sum(x.flops for x in rows) / 1e9:>10.3f} {sum(x.full_flops for x in rows) / 1e9:>10.3f} "
                f"{sum(x.kv_bytes for x in rows) / 1024:>10.1f} {sum(x.full_kv_bytes for x in rows) / 1024:>10.1f}"
            )
        lines.append(
            f"decoder arithmetic of the prefill x{self.flops_ratio:.3f}, KV cache x{self.kv_ratio:.3f} of unpruned"
        )
        return "\n".join(lines)


def make_report(trace: Trace | None, layers: tuple[nn.Module, ...], text_config: Any, itemsize: int, k: int) -> Report:
    """Cost every decoder layer at the tokens it ran on.

    Args:
        trace: of the latest prefill, or None.
        layers: the decoder layers; the sizes of their linear modules are read, never their weights.
        text_config: the language model's config.
        itemsize: bytes of one cached number.
        k: layers that run on the stage-1 tokens.
    """
    if trace is None:
        return Report(None, [])
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    kv_token = 2 * kv_heads * head_dim * itemsize
    active = (getattr(text_config, "num_experts_per_tok", 0) or 0) / (getattr(text_config, "num_experts", 1) or 1)
    costs = []
    for i, module in enumerate(layers):
        # PEFT keeps the original layer inside its own: both are counted, as both are run
        weights: float = sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))
        # experts are stacked, (experts, out, in), and a token runs through a few of them
        weights += active * sum(p.numel() for p in module.parameters() if p.dim() == 3)

        def flops(tokens: int, weights: float = weights) -> float:
            return 2.0 * weights * tokens + 2.0 * heads * head_dim * tokens**2

        kept = [layers_of[i] + text for layers_of, text in zip(trace.tokens_per_layer, trace.text_tokens, strict=True)]
        full = [visual + text for visual, text in zip(trace.visual_tokens, trace.text_tokens, strict=True)]
        visual = sum(layers_of[i] for layers_of in trace.tokens_per_layer)
        stage = "1" if i < k else "2" if visual else "wiped"
        costs.append(
            LayerCost(
                layer=i,
                stage=stage,
                visual_tokens=visual,
                flops=sum(map(flops, kept)),
                full_flops=sum(map(flops, full)),
                kv_bytes=sum(kept) * kv_token,
                full_kv_bytes=sum(full) * kv_token,
            )
        )
    return Report(trace, costs)
