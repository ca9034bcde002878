"""What a server is told to prune: checked where it is written, and read back by the server's processes."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig

from ..budget import StageBudget, stage_budget
from ..config import PruningConfig, make_config
from ..errors import ConfigError, UnsupportedModelError
from ..pruner import Pruner, find_pruner, pruner_source, resolve_pruner
from ..registry import features_width
from ..settings import check_strategies
from ..strategies import SCORERS, Scorer, may_use_pruner, resolve_scorer, resolve_text_scorer

KEY = "lp_patch"  # of the model's config, as vLLM's processes see it
ROWS_KEY = "lp_patch_rows"  # beside it: how many positions the rotary tables must hold
ARCHITECTURES = {
    name: f"LpPatch{name}"
    for name in (
        "InternVLForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
    )
}
READ_ATTENTION = ("LlavaForConditionalGeneration",)  # whose [CLS] a scorer can read
_STAGE2 = ("layer", "stage_ratio", "text_scorer", "final_wipe_layer")


class ServerOptions(NamedTuple):
    """What a server's process prunes with: as much of `lp_patch.settings.Settings` as stage 1 reads."""

    config: PruningConfig
    scorer: Scorer
    pruner: Pruner | None

    def budget(self, present: int) -> StageBudget:
        """What a picture of `present` tokens keeps; both numbers are the same."""
        if present == 0:
            return StageBudget(0, 0)
        return stage_budget(self.config.average(present), present, 2, 1, 1.0, rounding=self.config.rounding)


def overrides(model: str | Path, *, pruner: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """The ``hf_overrides`` with which vLLM serves `model` with fewer visual tokens.

    A server prunes in stage 1 only, so each decoder layer sees the same tokens: `tokens` is what a picture brings into
    the language model, and its KV cache.

    Args:
        model: a local checkpoint's folder, or a Hub id, as the server gets it.
        pruner: folder or Hub id of trained stage-1 weights; None: for "auto", and for a scorer that reads one, the one
            that belongs to the checkpoint, found as `lp_patch.apply` finds it.
        options: those of `lp_patch.apply` that are not of stage 2.

    Returns:
        For ``LLM(model, hf_overrides=...)``, or as JSON for ``--hf-overrides``.

    Raises:
        ConfigError: an option is misspelt, out of range, or one of stage 2.
        UnsupportedModelError: the checkpoint's architecture has no pruned twin here.
        PrunerError: the pruner cannot be loaded, or reads another width.
    """
    for name in _STAGE2:
        if name in options:
            raise ConfigError(
                f"{name}={options[name]!r} is an option of stage 2, which a vLLM server lacks (every layer runs "
                "on the same tokens there): leave it out, or use lp_patch.apply under transformers"
            )
    config = make_config(None, {**options, "stage_ratio": 1.0})
    if config.scorer == "none":
        raise ConfigError('scorer="none" leaves stage 1 out, and a vLLM server has no stage 2: use another scorer')
    if pruner is not None and not isinstance(pruner, (str, Path)):
        raise ConfigError(
            f"pruner must be a folder or a Hub id, which each of the server's processes loads, got "
            f"{type(pruner).__name__}: save it with save_pretrained(folder)"
        )
    hf_config = AutoConfig.from_pretrained(model)
    given = (hf_config.architectures or ["?"])[0]
    if given not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{str(model)!r} is a {given}; in vLLM, lp_patch prunes {', '.join(ARCHITECTURES)}. Under transformers "
            "lp_patch.apply knows more"
        )
    width = features_width(hf_config)
    if pruner is None and may_use_pruner(config.scorer):
        module, source = find_pruner(hf_config, width), pruner_source(hf_config)
    else:
        module, source = resolve_pruner(pruner, width, hf_config), pruner
    scorer = resolve_scorer(config.scorer, module)
    check_strategies(config, scorer, resolve_text_scorer(config.text_scorer))
    if scorer.mix is not None or any(reading.of == "tokens" for reading in scorer.reads):
        raise ConfigError(
            f"scorer={scorer.name!r} merges tokens or reads those of an early layer, which the plugin does not do: use "
            "another scorer, or lp_patch.apply under transformers"
        )
    if scorer.reads and given not in READ_ATTENTION:
        raise ConfigError(f"scorer={scorer.name!r} reads [CLS], which {given} does not have: use another scorer")
    if source is not None and Path(source).is_dir():
        source = Path(source).resolve()
    return {
        "architectures": [ARCHITECTURES[given]],
        KEY: {
            **{name: value for name, value in asdict(config).items() if name not in _STAGE2},
            "scorer": scorer.name,
            "pruner": None if module is None else str(source),
        },
    }


def options_of(hf_config: Any, width: int | None = None) -> ServerOptions:
    """The options that `overrides` wrote into a server's config.

    Args:
        hf_config: the model's config inside vLLM.
        width: load the pruner, which must read features of this width; None: leave it.

    Raises:
        ConfigError: there are none: the architecture was asked for by hand.
    """
    written = getattr(hf_config, KEY, None)
    if not isinstance(written, dict):
        raise ConfigError(
            f"an LpPatch architecture needs its options under {KEY!r} in hf_overrides, got {written!r}: pass "
            "hf_overrides=lp_patch.vllm.overrides(model, tokens=...)"
        )
    options = dict(written)
    pruner = options.pop("pruner", None)
    config = make_config(None, {**options, "stage_ratio": 1.0})
    module = None
    if width is not None and pruner is not None:
        module = Pruner.from_pretrained(pruner, width=width).requires_grad_(False)
    return ServerOptions(config, SCORERS[config.scorer], module)
