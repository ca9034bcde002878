"""The catalogue of strategies, by name."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lp_patch import ConfigError, LearnablePruner
from lp_patch.strategies import (
    SCORERS,
    TEXT_SCORERS,
    Stage1Input,
    resolve_scorer,
    resolve_text_scorer,
    text_query_weights,
)

settings.register_profile("steady", deadline=None, derandomize=True)  # a loaded machine is no failure
settings.load_profile("steady")


def scores(name, features, keep=4, seed=0, **given):
    return SCORERS[name].score(Stage1Input(features, keep, seed, **given))


def test_catalogue():
    assert set(SCORERS) == {"learned", "diversity", "cls", "random", "uniform"}
    assert set(TEXT_SCORERS) == {"text"}
    for name, scorer in SCORERS.items():
        assert scorer.name == name
        assert scorer.source  # where it comes from
    assert SCORERS["diversity"].score is None
    assert [name for name in SCORERS if SCORERS[name].needs_pruner] == ["learned"]
    assert [name for name in SCORERS if SCORERS[name].needs_cls_attention] == ["cls"]


@given(st.integers(1, 200), st.data())
def test_uniform_is_evenly_spaced(n, data):
    keep = data.draw(st.integers(1, n))
    got = scores("uniform", torch.zeros(2, n, 3), keep)
    assert got.shape == (2, n)
    for row in got.tolist():
        chosen = [i for i, score in enumerate(row) if score > 0]
        assert len(chosen) == keep
        gaps = [b - a for a, b in itertools.pairwise(chosen)]
        assert all(abs(gap - n / keep) < 1 for gap in gaps)
        # centred: what is left over at the two ends is half a gap each, to within a token
        assert abs(chosen[0] - (n - 1 - chosen[-1])) <= 1


def test_random_is_seeded_and_the_same_in_every_batch():
    alone, batch = torch.zeros(1, 50, 3), torch.zeros(4, 50, 3)
    first = scores("random", alone, seed=1)
    assert first.shape == (1, 50)
    assert first.unique().numel() == 50
    assert scores("random", alone, seed=1).equal(first)
    assert not scores("random", alone, seed=2).equal(first)
    assert scores("random", batch, seed=1).equal(first.expand(4, -1))


def test_random_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    scores("random", torch.zeros(1, 50, 3), seed=1)
    assert torch.get_rng_state().equal(before)


def test_learned_asks_the_pruner_and_cls_the_attention():
    torch.manual_seed(0)
    pruner = LearnablePruner(3, 8)
    features = torch.randn(2, 5, 3)
    expected = pruner(features).softmax(-1)[..., 1]
    torch.testing.assert_close(scores("learned", features, pruner=pruner), expected)
    attention = torch.rand(2, 5)
    assert scores("cls", features, cls_attention=attention).equal(attention)


def test_auto():
    pruner = LearnablePruner(3, 8)
    assert resolve_scorer("auto", None) is SCORERS["diversity"]
    assert resolve_scorer("auto", pruner) is SCORERS["learned"]
    assert resolve_scorer("learned", pruner) is SCORERS["learned"]
    for name in ("diversity", "cls", "random", "uniform"):
        assert resolve_scorer(name, None) is SCORERS[name]


def test_learned_needs_a_pruner():
    with pytest.raises(ConfigError, match='scorer="learned" needs trained weights: pass pruner='):
        resolve_scorer("learned", None)


@pytest.mark.parametrize("name", ["diversity", "cls", "random", "uniform"])
def test_a_pruner_that_would_be_ignored_is_refused(name):
    with pytest.raises(ConfigError, match=f'pruner was given but scorer="{name}" does not use it'):
        resolve_scorer(name, LearnablePruner(3, 8))


@pytest.mark.parametrize("name", ["", "Learned", "text", "fastv"])
def test_unknown_scorer(name):
    with pytest.raises(ConfigError, match=f"unknown scorer '{name}'. Allowed: auto, cls, diversity, learned, random, "):
        resolve_scorer(name, None)


@pytest.mark.parametrize("name", ["", "auto", "Text", "diversity"])
def test_unknown_text_scorer(name):
    with pytest.raises(ConfigError, match=f"unknown text_scorer '{name}'. Allowed: text"):
        resolve_text_scorer(name)
    assert resolve_text_scorer("text") is text_query_weights


def query_weights(row):
    """One row of "t"ext, "v"isual and "." padding."""
    last_visual = max((i for i, kind in enumerate(row) if kind == "v"), default=-1)
    queries = [i for i, kind in enumerate(row) if kind == "t" and i > last_visual]
    if not queries:
        queries = [i for i, kind in enumerate(row) if kind != "."][-1:]
    return [1 / len(queries) if i in queries else 0.0 for i in range(len(row))]


def weights(rows):
    kinds = [list(row) for row in rows]
    return text_query_weights(
        torch.tensor([[kind == "t" for kind in row] for row in kinds]),
        torch.tensor([[kind == "v" for kind in row] for row in kinds]),
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("ttvvtt", [0, 0, 0, 0, 0.5, 0.5]),
        ("tvtvvt", [0, 0, 0, 0, 0, 1]),  # only text after the last image has seen them all
        ("ttvv", [0, 0, 0, 1]),  # nothing asks: the last real token does
        ("vv..", [0, 1, 0, 0]),
        ("tttt", [0.25] * 4),
        ("..vt", [0, 0, 0, 1]),
        ("vtt.", [0, 0.5, 0.5, 0]),
        ("....", [0, 0, 0, 0]),
    ],
)
def test_text_query_weights_by_hand(row, expected):
    assert weights([row]).tolist() == [expected]


@given(st.integers(1, 12).flatmap(lambda n: st.lists(st.text("tv.", min_size=n, max_size=n), min_size=1, max_size=4)))
def test_text_query_weights(rows):
    got = weights(rows)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor([query_weights(row) for row in rows]))
