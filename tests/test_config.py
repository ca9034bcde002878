"""Every option's valid and invalid values, and how a config and options combine."""

import dataclasses
import inspect
import math
from types import MappingProxyType
from typing import get_type_hints

import pytest

import lp_patch
from lp_patch import ConfigError, PruningConfig
from lp_patch.config import Options, make_config

NAN, INF = math.nan, math.inf
NOT_INTEGERS = [True, False, 2.0, 2.5, "2", NAN, INF, [2], 1 + 0j]
NOT_NUMBERS = [True, False, "0.5", NAN, INF, -INF, None, [0.5], 1 + 0j]

VALID = [
    ("tokens", [1, 64, 10**9]),
    ("ratio", [1e-9, 0.5, 1, 1.0]),
    ("layer", [None, 1, 31]),
    ("stage_ratio", [1, 1.0, 1.5, 3, 1e6]),
    ("diversity", [0, 0.0, 0.1, 1, 1.0]),
    ("scorer", ["auto", "learned", "anything: the catalogue is asked at apply"]),
    ("text_scorer", ["text", "anything"]),
    ("final_wipe_layer", [None, 2, 32]),
    ("positions", ["original", "compact"]),
    ("seed", [0, 7, 2**31]),
    ("rounding", ["up", "down"]),
]
INVALID = [
    ("tokens", [0, -1, *NOT_INTEGERS]),
    ("ratio", [0, 0.0, -0.5, 1.0000001, 2, *(x for x in NOT_NUMBERS if x is not None)]),
    ("layer", [0, -1, *NOT_INTEGERS]),
    ("stage_ratio", [0, 0.999, -3, *NOT_NUMBERS]),
    ("diversity", [-0.001, 1.001, *NOT_NUMBERS]),
    ("scorer", [None, 1, True, ["auto"], b"auto"]),
    ("text_scorer", [None, 1, True, ["text"], b"text"]),
    ("final_wipe_layer", [1, 0, -1, *NOT_INTEGERS]),
    ("positions", ["", "Original", "compacted", None, True, 0]),
    ("seed", [-1, None, *NOT_INTEGERS]),
    ("rounding", ["", "Up", "floor", None, True, 0]),
]


def cases(table):
    return [pytest.param(name, value, id=f"{name}-{value!r}") for name, values in table for value in values]


def test_tables_cover_every_field():
    names = [field.name for field in dataclasses.fields(PruningConfig)]
    assert [name for name, _ in VALID] == names
    assert [name for name, _ in INVALID] == names


@pytest.mark.parametrize(("name", "value"), cases(VALID))
def test_valid(name, value):
    assert getattr(PruningConfig(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), cases(INVALID))
def test_invalid_names_the_option_and_the_value(name, value):
    with pytest.raises(ConfigError) as error:
        PruningConfig(**{name: value})
    assert name in str(error.value)
    assert repr(value) in str(error.value)
    assert isinstance(error.value, ValueError)


def test_defaults():
    config = PruningConfig()
    assert (config.tokens, config.ratio, config.layer, config.stage_ratio) == (None, 2 / 9, None, 3.0)
    assert (config.diversity, config.scorer, config.text_scorer) == (0.1, "auto", "text")
    assert (config.final_wipe_layer, config.positions, config.seed, config.rounding) == (None, "original", 0, "up")


def test_tokens_or_ratio():
    assert PruningConfig(tokens=64).ratio is None
    assert PruningConfig(tokens=None, ratio=None).ratio == 2 / 9
    with pytest.raises(ConfigError, match=r"not both: got tokens=64, ratio=0\.5"):
        PruningConfig(tokens=64, ratio=0.5)


def test_average():
    assert PruningConfig(tokens=64).average(576) == 64
    assert PruningConfig(tokens=64).average(10) == 64
    assert PruningConfig(ratio=0.25).average(576) == 144
    assert PruningConfig(ratio=1).average(7) == 7
    assert PruningConfig().average(576) == pytest.approx(128, abs=1e-9)


def test_frozen():
    config = PruningConfig(tokens=64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tokens = 32
    assert config == PruningConfig(tokens=64)
    assert hash(config) == hash(PruningConfig(tokens=64))
    assert config != PruningConfig(tokens=65)


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        (None, {}, PruningConfig()),
        (None, {"tokens": 64, "layer": 5}, PruningConfig(tokens=64, layer=5)),
        (PruningConfig(tokens=64, seed=3), {}, PruningConfig(tokens=64, seed=3)),
        (PruningConfig(tokens=64, seed=3), {"seed": 4}, PruningConfig(tokens=64, seed=4)),
        (PruningConfig(tokens=64, seed=3), {"tokens": 32}, PruningConfig(tokens=32, seed=3)),
        # tokens and ratio are one choice, and what is given now wins
        (PruningConfig(tokens=64, seed=3), {"ratio": 0.5}, PruningConfig(ratio=0.5, seed=3)),
        (PruningConfig(ratio=0.5, seed=3), {"tokens": 64}, PruningConfig(tokens=64, seed=3)),
        (PruningConfig(seed=3), {"tokens": 64}, PruningConfig(tokens=64, seed=3)),
        (PruningConfig(ratio=0.5), {"tokens": 64, "ratio": None}, PruningConfig(tokens=64)),
        (PruningConfig(tokens=64), {"tokens": None}, PruningConfig()),
        (PruningConfig(tokens=64), {"ratio": None}, PruningConfig(tokens=64)),
        (PruningConfig(ratio=0.5), {"tokens": None}, PruningConfig(ratio=0.5)),
        (PruningConfig(layer=9), {"layer": None}, PruningConfig()),
    ],
)
def test_options_override_the_config(config, options, expected):
    before = dataclasses.asdict(config) if config else None
    assert make_config(config, options) == expected
    assert before is None or dataclasses.asdict(config) == before


def test_options_are_validated_like_fields():
    with pytest.raises(ConfigError, match="not both"):
        make_config(None, {"tokens": 64, "ratio": 0.5})
    with pytest.raises(ConfigError, match="not both"):
        make_config(PruningConfig(tokens=64), {"tokens": 64, "ratio": 0.5})
    with pytest.raises(ConfigError, match="layer must be an int >= 1, got 0"):
        make_config(PruningConfig(), {"layer": 0})


@pytest.mark.parametrize(
    ("given", "meant"),
    [("token", "tokens"), ("ratios", "ratio"), ("Layer", "layer"), ("final_wipe", "final_wipe_layer"), ("sed", "seed")],
)
def test_misspelt_option_says_what_was_meant(given, meant):
    with pytest.raises(ConfigError) as error:
        make_config(None, {given: 1})
    message = str(error.value)
    assert f"unknown option '{given}'; did you mean '{meant}'?" in message
    for field in dataclasses.fields(PruningConfig):
        assert field.name in message.split("Allowed:")[1]


def test_strange_option_gets_no_suggestion():
    with pytest.raises(ConfigError, match=r"^unknown option 'quantise_xyz'\. Allowed: tokens, ratio, .*rounding$"):
        make_config(None, {"quantise_xyz": 1})


@pytest.mark.parametrize("config", [64, "fast", PruningConfig, [("tokens", 64)]])
def test_config_of_another_type(config):
    said = f"config must be a PruningConfig, a dict of its fields or None, got {type(config).__name__}"
    with pytest.raises(ConfigError, match=said):
        make_config(config, {})


@pytest.mark.parametrize("mapping", [dict, MappingProxyType])
def test_a_dict_is_a_config(mapping):
    given = mapping({"tokens": 64, "seed": 3})
    assert make_config(given, {}) == PruningConfig(tokens=64, seed=3)
    assert make_config(given, {"ratio": 0.5}) == PruningConfig(ratio=0.5, seed=3)
    assert given == {"tokens": 64, "seed": 3}
    assert make_config({}, {}) == PruningConfig()
    with pytest.raises(ConfigError, match=r"unknown option 'token'; did you mean 'tokens'\?"):
        make_config(mapping({"token": 64}), {})
    with pytest.raises(ConfigError, match="unknown option 64"):
        make_config(mapping({64: "tokens"}), {})
    with pytest.raises(ConfigError, match="tokens must be an int >= 1, got 0"):
        make_config(mapping({"tokens": 0}), {})


def test_options_are_in_the_signatures():
    """For editors, which read them there; type checkers read `Options`."""
    for function in (lp_patch.apply, lp_patch.applied):
        parameters = inspect.signature(function).parameters
        for field in dataclasses.fields(PruningConfig):
            assert parameters[field.name].default == field.default
            assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert get_type_hints(Options) == get_type_hints(PruningConfig)
