"""How much a prefill was shortened, in tokens, arithmetic and cache bytes."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from statistics import fmean
from typing import Any

from torch import nn

from .registry import RECURRENT, Kinds
from .trace import Encoded, Trace

NOTHING_YET = "no prefill yet"
COLUMNS = ("layers", "stage", "visual", "GFLOP", "unpruned", "KV KiB", "unpruned")
TOWER, PROJECTOR = "vision tower", "projector"


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
class PartCost:
    """What the vision tower or the projector computed for a prefill, as it ran and as it would have run unpruned.

    `tokens` are those that it ran on. `flops` counts as a layer's, but all of the attention's square.
    """

    name: str
    tokens: int
    full_tokens: int
    flops: float
    full_flops: float


@dataclass(frozen=True, repr=False)
class Report:
    """Costs of the latest prefill; `str()` is a table, and notebooks show one.

    Attributes:
        trace: of that prefill; None before the first one.
        layers: every decoder layer's costs; empty before the first prefill.
        parts: the vision tower's and the projector's, as far as they are known: not where the family packs pictures of
            all sizes into one sequence, nor for features that came encoded.
        settings: the options as they ran, defaults filled in.

    The embeddings, the head that makes logits, and the choice of tokens itself are not counted.
    """

    trace: Trace | None
    layers: list[LayerCost]
    parts: list[PartCost] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def flops_ratio(self) -> float | None:
        """Decoder arithmetic of the prefill, pruned over unpruned; None before the first one."""
        return _ratio((x.flops, x.full_flops) for x in self.layers)

    @property
    def prefill_ratio(self) -> float | None:
        """The same with `parts`, the vision tower and the projector; None where neither was counted."""
        costs: list[PartCost | LayerCost] = [*self.parts, *self.layers]
        return _ratio((x.flops, x.full_flops) for x in costs) if self.parts else None

    @property
    def kv_ratio(self) -> float | None:
        """KV-cache bytes after the prefill, pruned over unpruned; None before the first one."""
        return _ratio((x.kv_bytes, x.full_kv_bytes) for x in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and dicts, for JSON; ratios and token counts of no prefill are None."""
        t = self.trace
        return {
            "settings": dict(self.settings),
            "visual_tokens": None if t is None else list(t.visual_tokens),
            "text_tokens": None if t is None else list(t.text_tokens),
            "tokens_per_layer": None if t is None else [list(x) for x in t.tokens_per_layer],
            "merged": None if t is None else [x is not None for x in t.mixtures],
            "flops_ratio": self.flops_ratio,
            "prefill_ratio": self.prefill_ratio,
            "kv_ratio": self.kv_ratio,
            "parts": [asdict(x) for x in self.parts],
            "layers": [asdict(x) for x in self.layers],
        }

    def __str__(self) -> str:
        rows = [COLUMNS, *self._rows()] if self._rows() else []
        table = [f"{a:>12} {b:>9} {c:>9} {d:>10} {e:>10} {f:>10} {g:>10}".rstrip() for a, b, c, d, e, f, g in rows]
        return "\n".join([f"lp_patch: {self._summary()}", *table, *self._ratios()])

    def __repr__(self) -> str:
        return f"<lp_patch.Report: {'; '.join([self._summary(), *self._ratios()[:1]])}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
            for tag, cells in [("th", COLUMNS), *(("td", row) for row in self._rows())]
        )
        table = f"<table>{rows}</table>" if self._rows() else ""
        after = "".join(f"<p>{html.escape(line)}</p>" for line in self._ratios())
        return f"<p>lp_patch: {html.escape(self._summary())}</p>{table}{after}"

    def _summary(self) -> str:
        """What the prefill was."""
        if self.trace is None:
            return NOTHING_YET
        t = self.trace
        visual, text = sum(t.visual_tokens), sum(t.text_tokens)
        if visual == 0:
            return f"no visual tokens in the latest prefill ({len(t.visual_tokens)} prompts, {text} text tokens)"
        average = sum(fmean(layers) for layers in t.tokens_per_layer)
        return (
            f"{len(t.visual_tokens)} prompts, {visual} of {visual + text} tokens visual "
            f"({visual / (visual + text):.0%}); {average:.1f} visual tokens kept on average over the layers "
            f"({average / visual:.1%})"
        )

    def _rows(self) -> list[tuple[str, ...]]:
        """The table's cells; none without visual tokens."""
        if self.trace is None or sum(self.trace.visual_tokens) == 0:
            return []
        rows: list[tuple[str, ...]] = [
            (x.name, "", str(x.tokens), f"{x.flops / 1e9:.3f}", f"{x.full_flops / 1e9:.3f}", "", "") for x in self.parts
        ]
        for _, group in groupby(self.layers, key=lambda x: (x.stage, x.visual_tokens)):
            some = list(group)
            flops, full, kv, full_kv = (
                sum(getattr(x, name) for x in some) for name in ("flops", "full_flops", "kv_bytes", "full_kv_bytes")
            )
            span, first = f"{some[0].layer + 1}-{some[-1].layer + 1}", some[0]
            numbers = f"{flops / 1e9:.3f}", f"{full / 1e9:.3f}", f"{kv / 1024:.1f}", f"{full_kv / 1024:.1f}"
            rows.append((span, first.stage, f"{first.visual_tokens:.0f}", *numbers))
        return rows

    def _ratios(self) -> list[str]:
        """What was saved, what is not in it, and with which settings."""
        if not self._rows():
            return []
        counted = [x.name for x in self.parts]
        missing = [name for name in (TOWER, PROJECTOR) if name not in counted]
        whole = [f"with {' and '.join(counted)} {_less(self.prefill_ratio)}"] if counted else []
        merged = self.trace is not None and any(x is not None for x in self.trace.mixtures)
        return [
            f"decoder arithmetic of the prefill {_less(self.flops_ratio)}, KV cache {_less(self.kv_ratio)} of unpruned",
            ", ".join([*whole, *(f"{name} not counted" for name in missing)]),
            *(["stage 1 merged: its tokens are mixtures (trace.mixtures), none was kept as it was"] if merged else []),
            "settings: " + ", ".join(f"{name}={x!r}" for name, x in self.settings.items() if x is not None),
        ]


def _ratio(pairs: Iterable[tuple[float, float]]) -> float | None:
    """The sum of first numbers over that of second ones; None without any."""
    found = list(pairs)
    return sum(x for x, _ in found) / sum(x for _, x in found) if found else None


def _less(ratio: float | None) -> str:
    assert ratio is not None  # asked of a prefill alone
    return f"x{ratio:.3f}" + (f" ({1 / ratio:.1f}x less)" if 0 < ratio < 1 else "")


def make_report(
    trace: Trace | None,
    layers: tuple[nn.Module, ...],
    text_config: Any,
    itemsize: int,
    k: int,
    kinds: Kinds,
    parts: Sequence[PartCost] = (),
    settings: dict[str, Any] | None = None,
) -> Report:
    """Cost every decoder layer at the tokens it ran on.

    Args:
        trace: of the latest prefill, or None.
        layers: the decoder layers; the sizes of their linear modules are read, never their weights.
        text_config: the language model's config.
        itemsize: bytes of one cached number.
        k: layers that run on the stage-1 tokens.
        kinds: what the layers look at; of one without keys, neither its state nor its recurrence is counted.
        parts: what `part_costs` found.
        settings: the options as they ran.
    """
    if trace is None:
        return Report(None, [], [], settings or {})
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
    kv_token = 2 * kv_heads * head_dim * itemsize
    active = (getattr(text_config, "num_experts_per_tok", 0) or 0) / (getattr(text_config, "num_experts", 1) or 1)
    costs = []
    for i, module in enumerate(layers):
        # PEFT keeps the original layer inside its own: both are counted, as both are run
        weights: float = _linear(module)
        # experts are stacked, (experts, out, in), and a token runs through a few of them
        weights += active * sum(p.numel() for p in module.parameters() if p.dim() == 3)

        keyed = kinds.names[i] != RECURRENT
        pairs, window = 2.0 * heads * head_dim * keyed, kinds.windows[i]

        def flops(tokens: int, weights: float = weights, pairs: float = pairs, window: int | None = window) -> float:
            # a causal square's half; with a window, a band
            seen = tokens if window is None else min(tokens, 2 * window)
            return 2.0 * weights * tokens + pairs * tokens * seen

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
                kv_bytes=_stored(kept, kinds, i) * kv_token,
                full_kv_bytes=_stored(full, kinds, i) * kv_token,
            )
        )
    return Report(trace, costs, list(parts), settings or {})


def _stored(tokens: Iterable[int], kinds: Kinds, index: int) -> int:
    """Keys that a layer stores of so many tokens in each row."""
    if kinds.names[index] == RECURRENT or kinds.sources[index] != index:
        return 0
    window = kinds.windows[index]
    return sum(x if window is None else min(x, window - 1) for x in tokens)


def part_costs(encoded: Sequence[Encoded], tower: Any, projector: nn.Module | None) -> list[PartCost]:
    """Cost the vision tower and the projector at the tokens they ran on, as far as both are known.

    Args:
        encoded: what the prefill's encoding calls ran on; empty if it was given encoded features.
        tower: a vision transformer of which every token attends to all of its row, or None: not counted.
        projector: a module that works token by token, or None: not counted.
    """
    found = []
    if tower is not None and encoded:
        blocks = max((x for x in tower.modules() if isinstance(x, nn.ModuleList)), key=len)
        weights, width = _linear(blocks), tower.config.hidden_size
        patchify = sum(x.weight.numel() for x in tower.modules() if isinstance(x, nn.Conv2d))
        has_cls = any(
            name.rpartition(".")[2] in ("class_embedding", "cls_token") for name, _ in tower.named_parameters()
        )
        flops = 0.0
        for x in encoded:
            a_row = 2.0 * weights * x.tokens + 4.0 * width * len(blocks) * x.tokens**2
            flops += x.rows * (a_row + 2.0 * patchify * (x.tokens - has_cls))
        tokens = sum(x.rows * x.tokens for x in encoded)
        found.append(PartCost(TOWER, tokens, tokens, flops, flops))
    pairs = [(x.projected, x.present) for x in encoded if x.projected is not None and x.present is not None]
    if projector is not None and pairs:
        ran, full = sum(x for x, _ in pairs), sum(x for _, x in pairs)
        per_token = 2.0 * _linear(projector)
        found.append(PartCost(PROJECTOR, ran, full, per_token * ran, per_token * full))
    return found


def _linear(module: nn.Module) -> int:
    """Multiply-adds a token of all linear layers in a module."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))
