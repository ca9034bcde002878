"""The two-stage arithmetic against the paper's tables and against exact fractions."""

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lp_patch import ConfigError
from lp_patch.budget import default_layer, inside_budget, stage_budget


@pytest.mark.parametrize(
    ("average", "present", "expected"),
    [
        (192, 576, (330, 110)),
        (128, 576, (222, 74)),
        (64, 576, (111, 37)),
        (32, 576, (57, 19)),
        (640, 2880, (1098, 366)),
        (320, 2880, (549, 183)),
        (160, 2880, (276, 92)),
    ],
)
def test_main_table(average, present, expected):
    assert stage_budget(average, present, 32, 12, 3.0) == expected


@pytest.mark.parametrize(
    ("layer", "expected"), [(8, (129, 43)), (10, (120, 40)), (12, (111, 37)), (14, (105, 35)), (16, (96, 32))]
)
def test_layer_table(layer, expected):
    assert stage_budget(64, 576, 32, layer, 3.0) == expected


@pytest.mark.parametrize(
    ("ratio", "published"), [(1, (85, 85)), (1.5, (102, 68)), (2, (114, 57)), (3, (129, 43)), (4, (136, 34))]
)
def test_ratio_table_drops_every_visual_token_at_layer_24(ratio, published):
    # that table rounds where the formula takes the ceiling: one stage-2 token at most, and stage 1 is r times it
    stage1, stage2 = stage_budget(64, 576, 32, 12, ratio, 24)
    assert stage2 - published[1] in (0, 1)
    assert 0 <= stage1 - published[0] <= math.ceil(ratio)
    # without the wipe the published numbers are far off, so the rows above say something
    assert stage_budget(64, 576, 32, 12, ratio).stage2 < published[1] - 1


def test_figure_drops_every_visual_token_at_layer_24():
    assert stage_budget(32, 576, 32, 12, 3.0, 24) == (66, 22)


def rationals(low, high, denominator):
    """Fractions on a grid, the ends included."""
    return st.integers(low * denominator, high * denominator).map(lambda x: Fraction(x, denominator))


@st.composite
def settings(draw):
    n_layers = draw(st.integers(2, 80))
    layer = draw(st.integers(1, n_layers - 1))
    wipe = draw(st.none() | st.integers(layer + 1, n_layers))
    ratio = draw(rationals(1, 8, 4))
    present = draw(st.integers(1, 4000))
    average = draw(rationals(0, 4000, 9) | rationals(0, 1, 90).map(lambda share: share * present))
    assume(average > 0)
    return average, present, n_layers, layer, ratio, wipe


@given(settings())
def test_against_exact_fractions(case):
    average, present, n_layers, layer, ratio, wipe = case
    weight = ratio * layer + (wipe or n_layers) - layer
    stage2 = math.ceil(n_layers * average / weight)
    stage1 = ratio * stage2
    nearest = {math.floor(stage1 + Fraction(1, 2)), math.ceil(stage1 - Fraction(1, 2))}  # either way at one half
    expected = {(min(r1, present), min(stage2, present)) for r1 in nearest}
    if average >= present:
        expected = {(present, present)}
    assert stage_budget(float(average), present, n_layers, layer, float(ratio), wipe) in expected


@given(settings())
def test_true_average_meets_the_budget(case):
    average, present, n_layers, layer, ratio, wipe = case
    got = stage_budget(float(average), present, n_layers, layer, float(ratio), wipe)
    true = Fraction(got.stage1 * layer + got.stage2 * ((wipe or n_layers) - layer), n_layers)
    # one more stage-2 token costs `step`; rounding stage 1 moves the sum by half a token in each of its layers
    step = (ratio * layer + (wipe or n_layers) - layer) / n_layers
    rounding = Fraction(layer, 2 * n_layers)
    if average < present:
        assert true < average + step + rounding
        if got.stage1 < present:
            assert true >= average - (0 if ratio.denominator == 1 else rounding)
    assert 1 <= got.stage2 <= got.stage1 <= present


@given(settings(), rationals(0, 500, 9))
def test_more_budget_never_keeps_less(case, more):
    average, present, *rest = case
    small = stage_budget(float(average), present, *map(_plain, rest))
    large = stage_budget(float(average + more), present, *map(_plain, rest))
    assert large.stage1 >= small.stage1
    assert large.stage2 >= small.stage2


@given(settings())
def test_rounded_down_never_exceeds_the_budget(case):
    average, present, n_layers, layer, ratio, wipe = case
    assume(1 <= average < present)
    end = wipe or n_layers
    got = stage_budget(float(average), present, n_layers, layer, float(ratio), wipe, "down")
    true = Fraction(got.stage1 * layer + got.stage2 * (end - layer), n_layers)
    assert true <= average
    # and wastes less than a token, unless the layers before the wipe cannot spend it
    assert true > min(average, Fraction(present * end, n_layers)) - 1
    assert 1 <= got.stage2 <= got.stage1 <= present


@given(settings())
def test_rounded_down_against_exact_fractions(case):
    average, present, n_layers, layer, ratio, wipe = case
    assume(1 <= average < present)
    later = (wipe or n_layers) - layer
    spend = n_layers * average
    stage2 = max(1, min(present, math.floor(spend / (ratio * layer + later))))
    stage1 = stage2 if ratio == 1 else math.floor((spend - later * stage2) / layer)
    if stage1 > present:
        stage1, stage2 = present, min(present, math.floor((spend - layer * present) / later))
    got = stage_budget(float(average), present, n_layers, layer, float(ratio), wipe, "down")
    assert got == (min(stage1, present), stage2)


def test_rounded_down_by_hand():
    # 6 layers, 2 of them first: 192 tokens over all layers; 192 / (3 * 2 + 4) = 19.2, and (192 - 4 * 19) / 2 = 58
    assert stage_budget(32, 576, 6, 2, 3.0, None, "down") == (58, 19)
    assert stage_budget(32, 576, 6, 2, 3.0) == (60, 20)  # 33.3 on average
    # 24 of 32 on average: stage 1 has 32 alone, so stage 2 gets (24 * 32 - 12 * 32) / 20 = 19.2
    assert stage_budget(24, 32, 32, 12, 3.0, None, "down") == (32, 19)
    assert stage_budget(1e-6, 576, 32, 12, 3.0, None, "down") == (1, 1)
    assert stage_budget(64.9, 576, 32, 12, 1.0, None, "down") == (64, 64)
    assert inside_budget(192, 576, 32, 2, None, "down") == (576, 166)
    assert inside_budget(36.1, 576, 32, 2, None, "down") == (576, 1)


@given(settings())
def test_rounded_down_without_stage_1(case):
    average, present, n_layers, layer, _, wipe = case
    later = (wipe or n_layers) - layer
    left = n_layers * average - layer * present
    assume(average < present and left > 0)
    got = inside_budget(float(average), present, n_layers, layer, wipe, "down")
    assert got == (present, max(1, min(present, math.floor(left / later))))


def _plain(value):
    return float(value) if isinstance(value, Fraction) else value


@given(st.integers(1, 3000), st.integers(0, 500), st.none() | st.just(20))
def test_full_budget_keeps_everything(present, more, wipe):
    assert stage_budget(present + more, present, 32, 12, 3.0, wipe) == (present, present)


def test_clips_to_the_tokens_present():
    # 24 of 32 on average asks for 3 * 14 tokens in stage 1, of which there are 32
    assert stage_budget(24, 32, 32, 12, 3.0) == (32, 14)
    # a late wipe may ask for more than there are in both stages
    assert stage_budget(31, 32, 32, 12, 1.0, 13) == (32, 32)


def test_at_least_one_token_is_left():
    assert stage_budget(1e-6, 576, 32, 12, 3.0) == (3, 1)
    assert stage_budget(0.5, 1, 32, 12, 3.0) == (1, 1)
    assert stage_budget(1e-12, 576, 32, 12, 3.0) == (3, 1)


def test_stage_1_is_rounded():
    assert stage_budget(1e-6, 576, 32, 12, 1.25) == (1, 1)
    assert stage_budget(1e-6, 576, 32, 12, 1.75) == (2, 1)


def test_ratio_one_is_one_stage():
    assert stage_budget(64, 576, 32, 12, 1.0) == (64, 64)


@pytest.mark.parametrize("share", range(1, 100))
def test_float_noise_does_not_buy_a_token(share):
    # share/100 of 700 tokens is a whole number, which a float quotient may exceed by an ulp
    assert stage_budget(share / 100 * 700, 700, 10, 3, 1.0) == (7 * share, 7 * share)


@pytest.mark.parametrize(
    ("average", "expected"),
    # FastV's layer 2 of 32 on 576 tokens: what is left of 192 is 192 * 32 - 2 * 576 = 4992 = 30 * 166.4
    [(192, (576, 167)), (128, (576, 99)), (64, (576, 30)), (37, (576, 2)), (576, (576, 576)), (600, (576, 576))],
)
def test_without_stage_1(average, expected):
    assert inside_budget(average, 576, 32, 2) == expected


@given(settings())
def test_without_stage_1_against_exact_fractions(case):
    average, present, n_layers, layer, _, wipe = case
    end = wipe or n_layers
    if average >= present:
        assert inside_budget(float(average), present, n_layers, layer, wipe) == (present, present)
        return
    left = n_layers * average - layer * present
    if left <= 0:
        with pytest.raises(ConfigError) as error:
            inside_budget(float(average), present, n_layers, layer, wipe)
        if present > 1:
            smallest = next(t for t in range(1, present + 1) if n_layers * t > layer * present)
            assert f"tokens={smallest} " in str(error.value)
            assert inside_budget(smallest, present, n_layers, layer, wipe).stage2 >= 1
        return
    got = inside_budget(float(average), present, n_layers, layer, wipe)
    assert got == (present, min(present, math.ceil(left / (end - layer))))
    # the true average is the budget, or less than a token of the later layers above it
    true = Fraction(present * layer + got.stage2 * (end - layer), n_layers)
    assert true < average + Fraction(end - layer, n_layers)
    assert true >= average or got.stage2 == present


@pytest.mark.parametrize("share", range(21, 100))
def test_float_noise_does_not_buy_a_token_without_stage_1(share):
    # share/100 of 800 tokens over 10 layers, 2 of them on all: 8 * share * 10 - 1600, in 8 parts
    assert inside_budget(share / 100 * 800, 800, 10, 2) == (800, 10 * share - 200)


@pytest.mark.parametrize(("n_layers", "expected"), [(2, 1), (3, 1), (4, 2), (24, 9), (28, 10), (32, 12), (40, 15)])
def test_default_layer(n_layers, expected):
    # by hand: 0.375 of 28 is 10.5, rounded to even
    assert default_layer(n_layers) == expected


@given(st.integers(2, 200))
def test_default_layer_is_nearest_and_inside(n_layers):
    layer = default_layer(n_layers)
    assert 1 <= layer <= n_layers - 1
    assert abs(layer - Fraction(3 * n_layers, 8)) <= Fraction(1, 2)
