"""PruningConfig: every option of the method, frozen and validated."""

import difflib
import math
from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError

DEFAULT_RATIO = 2 / 9


@dataclass(frozen=True)
class PruningConfig:
    """Options of `lp_patch.apply`. Numbers marked (ours) are open in the paper.

    Attributes:
        tokens: budget, the average number of visual tokens over all decoder layers, for each image; int >= 1.
        ratio: the same as a share of that image's own tokens, in (0, 1]. Give one of the two; 2/9 by default (ours).
        layer: decoder layers that run on the stage-1 tokens (the paper's k, counted from 1), ``1 <= layer < L``;
            None means ``round(0.375 L)`` (ours for L other than 32).
        stage_ratio: R1 : R2, >= 1; 1 switches stage 2 off.
        diversity: share of R1 chosen by farthest-point selection, in [0, 1]. It holds for every scorer: pass 0 for a
            pure "random" or "uniform" baseline.
        scorer: stage 1 strategy, see `lp_patch.strategies`; "auto" is "learned" with a pruner, else "diversity".
        text_scorer: stage 2 strategy.
        final_wipe_layer: from this many layers on there is no visual token at all, ``layer < it <= L``; None: never.
        positions: position ids of the survivors: "original" (theirs in the full sequence; ours) or "compact"
            (numbered consecutively after stage 1; stage 2 never renumbers).
        seed: for strategies that draw.
    """

    tokens: int | None = None
    ratio: float | None = None
    layer: int | None = None
    stage_ratio: float = 3.0
    diversity: float = 0.1
    scorer: str = "auto"
    text_scorer: str = "text"
    final_wipe_layer: int | None = None
    positions: str = "original"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens is not None and self.ratio is not None:
            raise ConfigError(f"give tokens or ratio, not both: got tokens={self.tokens!r}, ratio={self.ratio!r}")
        if self.tokens is None and self.ratio is None:
            object.__setattr__(self, "ratio", DEFAULT_RATIO)
        if self.tokens is not None:
            _integer("tokens", self.tokens, low=1)
        if self.ratio is not None:
            _number("ratio", self.ratio)
            if not 0 < self.ratio <= 1:
                raise ConfigError(f"ratio must lie in (0, 1], got {self.ratio!r}")
        if self.layer is not None:
            _integer("layer", self.layer, low=1)
        _number("stage_ratio", self.stage_ratio)
        if self.stage_ratio < 1:
            raise ConfigError(f"stage_ratio must be >= 1 (1 switches stage 2 off), got {self.stage_ratio!r}")
        _number("diversity", self.diversity)
        if not 0 <= self.diversity <= 1:
            raise ConfigError(f"diversity must lie in [0, 1], got {self.diversity!r}")
        for name in ("scorer", "text_scorer"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} must be the name of a strategy, got {getattr(self, name)!r}")
        if self.final_wipe_layer is not None:
            _integer("final_wipe_layer", self.final_wipe_layer, low=2)
        if self.positions not in ("original", "compact"):
            raise ConfigError(f'positions must be "original" or "compact", got {self.positions!r}')
        _integer("seed", self.seed, low=0)

    def average(self, present: int) -> float:
        """The budget of an input that has `present` visual tokens: tokens averaged over all decoder layers."""
        return float(self.tokens) if self.tokens is not None else self.ratio * present  # type: ignore[operator]


def make_config(config: PruningConfig | None, options: dict[str, Any]) -> PruningConfig:
    """The config that `apply(model, config, **options)` means; options override the fields of `config`."""
    if config is not None and not isinstance(config, PruningConfig):
        raise ConfigError(f"config must be a PruningConfig or None, got {type(config).__name__}: {config!r}")
    names = [field.name for field in fields(PruningConfig)]
    for option in options:
        if option not in names:
            near = difflib.get_close_matches(option, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(f"unknown option {option!r}{hint} Allowed: {', '.join(names)}")
    values = {} if config is None else {name: getattr(config, name) for name in names}
    # tokens and ratio are one choice: the option given now replaces whichever the config held
    for given, other in (("tokens", "ratio"), ("ratio", "tokens")):
        if options.get(given) is not None and other not in options:
            values[other] = None
    return PruningConfig(**{**values, **options})


def _integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be an int >= {low}, got {value!r}")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}")
