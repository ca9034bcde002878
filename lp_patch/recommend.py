"""Settings that travel with a pruner: where stage 2 stands and what it leaves, for a strategy at a budget."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from .config import PruningConfig, make_config
from .errors import ConfigError

FOR = ("scorer", "text_scorer", "tokens", "ratio")
GIVES = ("layer", "stage_ratio", "rounding")
NOTES = ("prompts",)  # on how many it was measured
# who gives one of these by name has said otherwise
CONTRARY = (*GIVES, "final_wipe_layer")


def recommendation(config: PruningConfig, scorer: str, prompts: int) -> dict[str, Any]:
    """An entry that says what `config` has, for the strategy that its scorer means."""
    named = {name: getattr(config, name) for name in (*FOR, *GIVES)}
    return {name: x for name, x in {**named, "scorer": scorer, "prompts": prompts}.items() if x is not None}


def check_recommended(entries: object) -> list[dict[str, Any]]:
    """The entries of a pruner's config, checked.

    Raises:
        ConfigError: they are no list of such entries.
    """
    if not isinstance(entries, list) or not all(isinstance(x, dict) for x in entries):
        raise ConfigError(f"recommended must be a list of dicts, got {entries!r:.200}")
    for entry in entries:
        unknown = set(entry) - {*FOR, *GIVES, *NOTES}
        if unknown or "scorer" not in entry or not {"tokens", "ratio"} & set(entry):
            raise ConfigError(
                f"a recommended setting names scorer, tokens or ratio, and of {', '.join((*FOR, *GIVES, *NOTES))} "
                f"whatever else: got {entry!r:.200}"
            )
        make_config(None, {name: x for name, x in entry.items() if name not in NOTES})
    return entries


def merged(entries: Sequence[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries with one more, in place of an earlier one for the same strategy and budget."""
    others = [x for x in entries if any(x.get(name) != entry.get(name) for name in FOR)]
    return sorted([*others, entry], key=lambda x: (x["scorer"], x.get("tokens") or 0, x.get("ratio") or 0))


def recommended(
    config: PruningConfig, entries: Sequence[dict[str, Any]], scorer: str, named: Collection[str]
) -> PruningConfig:
    """The config with what the entry for its strategy and budget recommends, unless the caller said otherwise.

    Args:
        config: made of what the caller named.
        scorer: the strategy that its scorer means.
        named: the options that the caller gave by name.
    """
    if any(name in named for name in CONTRARY):
        return config
    wanted = {**{name: getattr(config, name) for name in FOR}, "scorer": scorer}
    for entry in entries:
        if all({"text_scorer": PruningConfig.text_scorer, **entry}.get(name) == wanted[name] for name in FOR):
            return replace(config, **{name: entry[name] for name in GIVES if name in entry})
    return config
