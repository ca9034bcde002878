"""PruningConfig: every option of the method, frozen and validated."""

import difflib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from .errors import ConfigError

DEFAULT_RATIO = 2 / 9
CONFIG_FILE = "pruning.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PruningConfig:
    """Options of `lp_patch.apply`. Numbers marked (ours) are open in the paper.

    Attributes:
        tokens: budget, the average number of visual tokens over all decoder layers, for each image; int >= 1.
        ratio: the same as a share of that image's own tokens, in (0, 1]. Give one of the two; 2/9 by default (ours).
        layer: decoder layers that run on the stage-1 tokens (the paper's k, counted from 1), ``1 <= layer < L``;
            None means the text_scorer's own, else ``round(0.375 L)`` (ours for L other than 32).
        stage_ratio: R1 : R2, >= 1; 1 switches stage 2 off.
        diversity: share of R1 chosen by farthest-point selection, in [0, 1]. It holds for every scorer that scores:
            pass 0 for a pure "random" or "uniform" baseline. A scorer with a rule of its own refuses it, except 0.
        scorer: stage 1 strategy, see `lp_patch.strategies`; "auto" is "learned" with a pruner, else "diversity".
        text_scorer: stage 2 strategy.
        final_wipe_layer: from this many layers on there is no visual token at all, ``layer < it <= L``; None: never.
        positions: position ids of the survivors: "original" (theirs in the full sequence; ours) or "compact"
            (numbered consecutively after stage 1; stage 2 never renumbers).
        seed: for strategies that draw.
        rounding: "up", the paper's ceiling, whose true average may exceed the budget by a token or two; or "down",
            which keeps to the budget (ours): R2 rounded down, R1 taking what that leaves.
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
    rounding: str = "up"

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
        if self.rounding not in ("up", "down"):
            raise ConfigError(f'rounding must be "up" or "down", got {self.rounding!r}')

    def save(self, folder: str | Path) -> None:
        """Write ``pruning.json`` into `folder`, which is made if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "PruningConfig":
        """Read ``pruning.json`` of `folder`; values are checked like arguments.

        Raises:
            ConfigError: no such file, not JSON, a newer format, an unknown option or a wrong value.
        """
        path = Path(folder) / CONFIG_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the settings {str(path)!r}: {error}") from error
        if not isinstance(content, dict) or content.pop("format_version", None) != FORMAT_VERSION:
            raise ConfigError(
                f"{str(path)!r} is no settings file of format_version {FORMAT_VERSION}, which this lp_patch reads"
            )
        return make_config(None, content)

    def average(self, present: int) -> float:
        """The budget of an input that has `present` visual tokens: tokens averaged over all decoder layers."""
        return float(self.tokens) if self.tokens is not None else self.ratio * present  # type: ignore[operator]


class Options(TypedDict, total=False):
    """The options of `apply`, for editors and type checkers: the fields of `PruningConfig`."""

    tokens: int | None
    ratio: float | None
    layer: int | None
    stage_ratio: float
    diversity: float
    scorer: str
    text_scorer: str
    final_wipe_layer: int | None
    positions: str
    seed: int
    rounding: str


Function = TypeVar("Function", bound=Callable)


def shows_options(function: Function) -> Function:
    """Put the options, with their defaults, in the signature of a function that takes them as `**options`.

    Calls are as they were: a misspelt option still arrives there.
    """
    signature = inspect.signature(function)
    kept = [x for x in signature.parameters.values() if x.kind is not inspect.Parameter.VAR_KEYWORD]
    shown = [
        inspect.Parameter(x.name, inspect.Parameter.KEYWORD_ONLY, default=x.default, annotation=x.type)
        for x in fields(PruningConfig)
    ]
    function.__signature__ = signature.replace(parameters=[*kept, *shown])  # type: ignore[attr-defined]
    return function


def make_config(config: PruningConfig | Mapping[str, Any] | None, options: Mapping[str, Any]) -> PruningConfig:
    """The config that `apply(model, config, **options)` means; options override the fields of `config`."""
    if isinstance(config, Mapping):
        config = make_config(None, config)
    if config is not None and not isinstance(config, PruningConfig):
        raise ConfigError(
            f"config must be a PruningConfig, a dict of its fields or None, got {type(config).__name__}: {config!r}"
        )
    names = [field.name for field in fields(PruningConfig)]
    for option in options:
        if option not in names:
            near = difflib.get_close_matches(str(option), names, n=1)
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
