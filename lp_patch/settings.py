"""What the options mean on one model: everything that `apply` can decide or refuse before the first call."""

import inspect
from dataclasses import dataclass

from torch import nn

from .attention import check_rotary, check_tappable
from .budget import StageBudget, default_layer, inside_budget, stage_budget
from .config import PruningConfig
from .errors import ConfigError
from .pruner import Pruner
from .registry import Kinds, Parts
from .strategies import SCORERS, Reading, Scorer, TextScorer, resolve_scorer, resolve_text_scorer
from .trace import Shape


@dataclass(frozen=True)
class Settings:
    """A config resolved for one model.

    Attributes:
        shape: where the stages begin.
        readings: the vision attention modules that the scorer reads at, each once, and what it reads there.
        kinds: what the decoder layers look at.
        arguments: names of a decoder layer's arguments, in order; `per_token` those that hold a row for each token.
        streams: whether hidden states between the layers are several streams (A, B, N, C).
    """

    config: PruningConfig
    scorer: Scorer
    text_scorer: TextScorer
    pruner: Pruner | None
    shape: Shape
    readings: tuple[tuple[nn.Module, tuple[Reading, ...]], ...]
    kinds: Kinds
    arguments: tuple[str, ...]
    per_token: tuple[str, ...]
    streams: bool

    def budget(self, present: int) -> StageBudget:
        """What a visual input of `present` tokens keeps."""
        if present == 0:
            return StageBudget(0, 0)
        n_layers, layer, wipe_layer = self.shape
        average, rounding = self.config.average(present), self.config.rounding
        if self.scorer.keeps_all:
            return inside_budget(average, present, n_layers, layer, wipe_layer, rounding)
        return stage_budget(average, present, n_layers, layer, self.config.stage_ratio, wipe_layer, rounding)


def resolve(parts: Parts, config: PruningConfig, pruner: Pruner | None) -> Settings:
    """The config's options on this model.

    Raises:
        ConfigError: an option is out of this model's range, or would have no effect.
        UnsupportedModelError: a layer that a strategy reads cannot be read.
    """
    scorer, text_scorer = resolve_scorer(config.scorer, pruner), resolve_text_scorer(config.text_scorer)
    n_layers = len(parts.layers)
    layer = _layer(parts, config, text_scorer)
    wipe = config.final_wipe_layer
    if not 1 <= layer < n_layers:
        raise ConfigError(f"layer must lie in [1, {n_layers - 1}] for {n_layers} decoder layers, got {layer}")
    if wipe is not None and not layer < wipe <= n_layers:
        raise ConfigError(f"final_wipe_layer must lie in [{layer + 1}, {n_layers}] (after layer={layer}), got {wipe}")
    shape = Shape(n_layers, layer, None if wipe == n_layers else wipe)
    check_strategies(config, scorer, text_scorer)
    if scorer.mix is not None and parts.projector is None:
        raise ConfigError(
            f"scorer={scorer.name!r} mixes tokens before a projector that works token by token, which "
            f'{parts.adapter.family} does not have: use a scorer that keeps tokens as they are, such as "diversity"'
        )
    settings = Settings(
        config,
        scorer,
        text_scorer,
        pruner,
        shape,
        readings(parts, scorer),
        parts.kinds,
        tuple(inspect.signature(parts.layers[0].forward).parameters),
        parts.adapter.per_token,
        parts.adapter.streams,
    )
    if scorer.keeps_all and config.ratio is not None:
        settings.budget(1)  # refuses what is too small for any input
    fewest = None if parts.adapter.fewest is None else parts.adapter.fewest(parts.model.config)
    if fewest is not None:
        settings.budget(fewest)  # refuses what no image could be pruned to
    if config.stage_ratio > 1:
        check_tappable(parts.attention[layer - 1], f"the attention of decoder layer {layer}")
        if text_scorer.unrotates:
            check_rotary(parts.attention[layer - 1], parts.rotary, f"the attention of decoder layer {layer}")
    if config.positions == "compact" and (parts.kinds.masked or parts.blocks):
        raise ConfigError(
            f'positions="compact" has no meaning for {parts.adapter.family}, whose layers look at what their masks '
            'say: use positions="original"'
        )
    if config.positions == "compact" and hasattr(parts.rotary, "mrope_section"):
        raise ConfigError(
            f'positions="compact" has no meaning for the several axes of position ids of {parts.adapter.family}: '
            'use positions="original"'
        )
    if layer < parts.first_cut and (config.stage_ratio > 1 or shape.wipe_layer is not None):
        raise ConfigError(
            f"{parts.adapter.family} adds visual features in its first {parts.first_cut} decoder layers: "
            f"layer must be at least {parts.first_cut}, got {layer}"
        )
    latest = layer if shape.wipe_layer is None else shape.wipe_layer
    if latest > parts.kinds.last_cut and (config.stage_ratio > 1 or shape.wipe_layer is not None):
        raise ConfigError(
            f"later decoder layers of {parts.adapter.family} share the keys of layer {parts.kinds.last_cut + 1}: layer "
            f"and final_wipe_layer must be at most {parts.kinds.last_cut}, got {latest}"
        )
    if shape.wipe_layer is not None and parts.kinds.joined[shape.wipe_layer]:
        raise ConfigError(
            f"decoder layer {shape.wipe_layer + 1} of {parts.adapter.family} takes over which keys an earlier layer "
            f"picked: final_wipe_layer={shape.wipe_layer} would come between"
        )
    return settings


def _layer(parts: Parts, config: PruningConfig, text_scorer: TextScorer) -> int:
    """The paper's k: the one asked for, or the nearest to the default that can rank tokens."""
    n_layers, able = len(parts.layers), parts.kinds.scoring()
    if config.layer is not None:
        if config.stage_ratio > 1 and 1 <= config.layer < n_layers and able and config.layer not in able:
            near = sorted(sorted(able, key=lambda x: (abs(x - config.layer), x))[:4])  # type: ignore[operator]
            raise ConfigError(
                f"decoder layer {config.layer} of {parts.adapter.family} cannot rank all visual tokens, or no cut can "
                "follow it: it has a window, no attention at all, or shares keys with later ones. Use "
                f"layer={' or '.join(map(str, near))}, or stage_ratio=1 for stage 1 alone"
            )
        return config.layer
    wanted = text_scorer.layer or default_layer(n_layers)
    # a default that DeepStack forbids would refuse a model that nobody gave a layer for
    allowed = [x for x in able if x >= parts.first_cut] or [min(max(wanted, parts.first_cut), n_layers - 1)]
    return min(allowed, key=lambda x: (abs(x - wanted), x))


def check_strategies(config: PruningConfig, scorer: Scorer, text_scorer: TextScorer) -> None:
    """Refuse options that the strategies would ignore."""
    if (scorer.select or scorer.mix or scorer.keeps_all) and config.diversity not in (0, PruningConfig.diversity):
        raise ConfigError(
            f"diversity={config.diversity} has no effect with scorer={scorer.name!r}, which has a rule of its own: "
            "leave it out"
        )
    if scorer.keeps_all and config.stage_ratio != PruningConfig.stage_ratio:
        raise ConfigError(
            f"stage_ratio={config.stage_ratio} has no meaning with scorer={scorer.name!r}, which keeps all tokens "
            "until stage 2: leave it out"
        )
    if text_scorer.alone and not scorer.keeps_all:
        raise ConfigError(
            f"text_scorer={text_scorer.name!r} is a method without stage 1, got scorer={scorer.name!r}: pass "
            'scorer="none", or another text_scorer'
        )
    if config.stage_ratio == 1 and config.text_scorer != PruningConfig.text_scorer:
        raise ConfigError(
            f"stage_ratio=1 switches stage 2 off, so text_scorer={config.text_scorer!r} has no effect: drop one"
        )


def readings(parts: Parts, scorer: Scorer) -> tuple[tuple[nn.Module, tuple[Reading, ...]], ...]:
    """The vision attention modules that the scorer reads at, each once, and what it reads there.

    Raises:
        ConfigError: the family has no [CLS], or too few vision layers.
        UnsupportedModelError: an attention that cannot be read.
    """
    if not scorer.reads:
        return ()
    adapter = parts.adapter
    if adapter.vision_attention is None:
        allowed = sorted(f'"{name}"' for name, x in SCORERS.items() if not x.reads and not x.needs_pruner)
        raise ConfigError(
            f"scorer={scorer.name!r} needs a [CLS] token that ranks the visual tokens one to one, which "
            f'{adapter.family} does not have: use one of {", ".join(allowed)}, or "learned" with a pruner'
        )
    modules = adapter.vision_attention(parts.base)
    found: dict[int, tuple[Reading, ...]] = {}
    for reading in scorer.reads:
        number = max(1, round(reading.depth * len(modules)))
        if reading.of == "tokens":
            number += 1  # the next layer's attention is given them
            if number > len(modules):
                raise ConfigError(
                    f"scorer={scorer.name!r} reads tokens between two vision layers, {adapter.family} uses "
                    f"{len(modules)} here: use another scorer"
                )
        else:
            check_tappable(modules[number - 1], f"the attention of vision layer {number}")
        found[number] = (*found.get(number, ()), reading)
    return tuple((modules[number - 1], own) for number, own in found.items())
