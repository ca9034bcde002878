"""Selection against brute-force loops, on vectors whose cosines are exact, so that ties are real ties."""

import math
import struct
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from lp_patch import select
from lp_patch.cut import Cut, keep_cut, restore_index
from lp_patch.select import (
    cosines,
    covering_points,
    farthest_points,
    select_tokens,
    take,
    top_indices,
    top_mask,
    true_slots,
)

settings.register_profile("steady", deadline=None, derandomize=True)  # a loaded machine is no failure
settings.load_profile("steady")


def cosine(a, b):
    """By plain sums in float64, rounded to float32: a token's with its copy is 1."""
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    value = sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0
    return struct.unpack("f", struct.pack("f", value))[0]


def greedy(features, seeds, count):
    """Farthest points, one comparison at a time; strict `<` leaves ties to the lowest index."""
    tokens = range(len(features))
    chosen = list(seeds)
    for _ in range(count):
        best, least = None, math.inf
        for i in tokens:
            if i in chosen:
                continue
            # the first token of an empty set: the one whose nearest other is farthest away
            rivals = chosen or [j for j in tokens if j != i]
            value = max((cosine(features[i], features[j]) for j in rivals), default=-math.inf)
            if value < least:
                best, least = i, value
        chosen.append(best)
    return chosen


SIGNS = st.tuples(*[st.sampled_from([-1.0, 1.0])] * 4)
AXES = st.sampled_from([tuple(s * float(i == j) for j in range(4)) for i in range(4) for s in (-2.0, 1.0)])
ZERO = st.just((0.0,) * 4)  # resembles nothing
EXACT = SIGNS | AXES | ZERO  # cosines are multiples of 1/4 or 1/2: float32 holds them exactly


@st.composite
def rows_and_seeds(draw, vectors=EXACT, max_tokens=9):
    n = draw(st.integers(1, max_tokens))
    row = draw(st.lists(vectors, min_size=n, max_size=n))
    seeds = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n))
    return row, seeds, draw(st.integers(0, n - len(seeds)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_tokens_that_are_each_others_nearest_tie(monkeypatch, dtype):
    """The start is often one of such a pair; rounding must not decide which, on MPS either, which has no float64."""
    monkeypatch.setattr(select, "_wide", lambda features: dtype)
    for seed in range(200):
        n_tokens = 3 + seed % 14
        features = torch.randn(2, n_tokens, 33, generator=torch.Generator().manual_seed(seed))
        got = farthest_points(features, torch.empty(2, 0, dtype=torch.long), 1)
        assert got.tolist() == [greedy(row.double().tolist(), [], 1) for row in features]


@given(rows_and_seeds())
def test_farthest_points_with_duplicates_and_zero_vectors(case):
    row, seeds, count = case
    got = farthest_points(torch.tensor([row]), torch.tensor([seeds], dtype=torch.long), count)
    assert got.dtype == torch.int64
    assert got.tolist() == [greedy(row, seeds, count)]


@pytest.mark.parametrize("n_seeds", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_farthest_points_on_random_features(n_seeds, dtype):
    generator = torch.Generator().manual_seed(n_seeds)
    features = torch.randn(3, 30, 5, generator=generator, dtype=torch.float64)
    features = features * 10 ** torch.randn(3, 30, 1, generator=generator, dtype=torch.float64)  # length must not count
    seeds = torch.stack([torch.randperm(30, generator=generator)[:n_seeds] for _ in range(3)])
    got = farthest_points(features.to(dtype), seeds, 12)
    expected = [greedy(features[b].tolist(), seeds[b].tolist(), 12) for b in range(3)]
    assert got.tolist() == expected


def test_starts_from_the_token_whose_nearest_other_is_farthest():
    # on the unit circle, degrees: 0 and 10 are neighbours, 90 is 60 from 150 and 80 from 10, 250 is 100 from 150
    degrees = torch.tensor([0.0, 10.0, 90.0, 150.0, 250.0]).deg2rad()
    features = torch.stack([degrees.cos(), degrees.sin()], dim=1)[None]
    none = torch.empty(1, 0, dtype=torch.long)
    # 250; then only distance to the set counts: 90 (160 away) before 0 (110) and 10 (120)
    assert farthest_points(features, none, 3).tolist() == [[4, 2, 0]]


def test_a_token_is_no_neighbour_of_its_own():
    # all cosines are negative: a token's own must not count, neither as 1 nor as 0
    degrees = torch.tensor([0.0, 120.0, 250.0]).deg2rad()
    features = torch.stack([degrees.cos(), degrees.sin()], dim=1)[None]
    assert farthest_points(features, torch.empty(1, 0, dtype=torch.long), 1).tolist() == [[1]]


@given(st.lists(rows_and_seeds(max_tokens=6), min_size=2, max_size=4))
def test_rows_of_a_batch_do_not_meet(cases):
    n = min(len(row) for row, _, _ in cases)
    features = torch.tensor([row[:n] for row, _, _ in cases])
    seeds = torch.tensor([[i % n] for i in range(len(cases))])
    together = farthest_points(features, seeds, n - 1)
    alone = [farthest_points(features[i : i + 1], seeds[i : i + 1], n - 1)[0].tolist() for i in range(len(cases))]
    assert together.tolist() == alone


# one row of 23 has 529 pairs: from no table at all to three tables at once
@pytest.mark.parametrize("elements", [1, 30, 97, 529, 1200])
@pytest.mark.parametrize("n_seeds", [0, 4])
def test_blocks_change_nothing(monkeypatch, elements, n_seeds):
    generator = torch.Generator().manual_seed(5)
    features = torch.randint(0, 2, (3, 23, 16), generator=generator).float() * 2 - 1  # cosines in sixteenths: exact
    seeds = torch.arange(n_seeds).expand(3, -1)
    whole = farthest_points(features, seeds, 10)
    monkeypatch.setattr(select, "_CHUNK_ELEMENTS", elements)
    assert farthest_points(features, seeds, 10).equal(whole)
    assert whole.tolist() == [greedy(row, list(range(n_seeds)), 10) for row in features.tolist()]


def test_no_block_outgrows_the_limit(monkeypatch):
    sizes = []
    real = torch.bmm
    monkeypatch.setattr(select, "_CHUNK_ELEMENTS", 300)
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append(a.shape[0] * a.shape[1] * b.shape[2]) or real(a, b))
    farthest_points(torch.randn(2, 40, 3), torch.empty(2, 0, dtype=torch.long), 5)
    assert sizes
    assert max(sizes) <= 300


@st.composite
def copies(draw):
    """(B, N, C) of random numbers in which tokens stand twice or more, by position chosen at random."""
    batch, n, width = draw(st.integers(1, 5)), draw(st.integers(2, 40)), draw(st.sampled_from([3, 31, 64, 257]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    distinct = torch.randn(batch, n, width, generator=generator)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    return take(distinct, torch.randint(0, n, (batch, n), generator=generator)).to(dtype)


@given(copies(), st.data())
def test_copies_tie_wherever_they_stand(features, data):
    n = features.shape[1]
    n_seeds = data.draw(st.integers(0, n - 1))
    seeds = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(b)) for b in range(len(features))])
    got = farthest_points(features, seeds[:, :n_seeds], n - n_seeds)
    for row, known, chosen in zip(features.double().tolist(), seeds.tolist(), got.tolist(), strict=True):
        assert chosen == greedy(row, known[:n_seeds], n - n_seeds)


@given(copies(), st.integers(1, 40))
def test_a_row_keeps_what_it_keeps_alone(features, count):
    count = min(count, features.shape[1])
    scores = torch.rand(features.shape[:2], generator=torch.Generator().manual_seed(count))
    for choose in (
        lambda f, s: farthest_points(f, top_indices(s, count // 2), count - count // 2),
        lambda f, s: covering_points(f, s, count),
        lambda f, s: select_tokens(f, None, count, 0.1),
    ):
        together = choose(features, scores)
        # alone, at other strides, and among other mates
        for b in range(len(features)):
            assert choose(features[b : b + 1], scores[b : b + 1])[0].equal(together[b])
        slow = features.transpose(1, 2).contiguous().transpose(1, 2)
        assert choose(slow.flip(0), scores.flip(0)).equal(together.flip(0))


@given(copies(), st.sampled_from([1, 100, 2000]))
def test_a_step_computes_what_a_table_holds(features, elements):
    before = select._CHUNK_ELEMENTS
    whole = farthest_points(features, torch.empty(len(features), 0, dtype=torch.long), features.shape[1])
    try:
        select._CHUNK_ELEMENTS = elements
        parts = farthest_points(features, torch.empty(len(features), 0, dtype=torch.long), features.shape[1])
    finally:
        select._CHUNK_ELEMENTS = before
    assert parts.equal(whole)


@given(copies())
def test_cosines(features):
    got = cosines(features)
    assert got.dtype == torch.float32
    assert got.equal(got.transpose(1, 2))
    unit = torch.nn.functional.normalize(features.double(), dim=2)
    torch.testing.assert_close(got.double(), unit @ unit.transpose(1, 2), rtol=0, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_tokens_that_are_not_finite_resemble_nothing(bad):
    features = torch.eye(4).repeat(1, 2, 1)  # each token twice
    features[0, 3, 1] = features[0, 6] = bad
    nothing = features.clone()
    nothing[0, 3] = nothing[0, 6] = 0
    none = torch.empty(1, 0, dtype=torch.long)
    assert cosines(features).equal(cosines(nothing))
    assert farthest_points(features, none, 8).tolist() == [greedy(nothing[0].tolist(), [], 8)]
    scores = torch.rand(1, 8)
    scores[0, 5] = bad
    assert sorted(covering_points(features, scores, 8)[0].tolist()) == list(range(8))
    assert select_tokens(features, scores, 8, 0.5).tolist() == [list(range(8))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_are_compared_in_float32(dtype):
    # 300 ** 2 overflows float16, and neighbours this close are one number in bfloat16
    features = torch.tensor([[[300.0, 0.0], [300.0, 10.0], [300.0, 12.0]]]).to(dtype)
    expected = greedy(features[0].double().tolist(), [0], 2)
    assert expected == [0, 2, 1]
    assert farthest_points(features, torch.tensor([[0]]), 2).tolist() == [expected]


def test_nothing_to_add():
    seeds = torch.tensor([[3, 1]])
    assert farthest_points(torch.randn(1, 5, 2), seeds, 0).equal(seeds)


SCORES = st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40)


@given(SCORES, st.data())
def test_top_indices(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    assert top_indices(torch.tensor([scores]), count).tolist() == [expected]


@st.composite
def scored_candidates(draw):
    batch, n = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    value = st.sampled_from([-math.inf, -2.0, 0.0, 0.5, 1.0])

    def rows(element):
        return st.lists(st.lists(element, min_size=n, max_size=n), min_size=batch, max_size=batch)

    counts = draw(st.lists(st.integers(0, n + 3), min_size=batch, max_size=batch))
    return draw(rows(value)), draw(rows(st.booleans())), counts


@given(scored_candidates())
def test_top_mask(case):
    scores, candidates, counts = case
    expected = []
    for row, allowed, count in zip(scores, candidates, counts, strict=True):
        best = sorted((i for i in range(len(row)) if allowed[i]), key=lambda i: (-row[i], i))[:count]
        expected.append([i in best for i in range(len(row))])
    got = top_mask(torch.tensor(scores), torch.tensor(candidates), torch.tensor(counts)[:, None])
    assert got.dtype == torch.bool
    assert got.tolist() == expected


@given(rows_and_seeds(), st.data())
def test_select_tokens(case, data):
    row, _, _ = case
    n = len(row)
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=n, max_size=n))
    keep = data.draw(st.integers(1, n))
    diversity = data.draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]))
    best = sorted(range(n), key=lambda i: (-scores[i], i))
    by_score = keep - round(diversity * keep)
    got = select_tokens(torch.tensor([row]), torch.tensor([scores]), keep, diversity)
    assert got.tolist() == [sorted(greedy(row, best[:by_score], keep - by_score))]
    assert got.unique().numel() == keep


@given(rows_and_seeds(), st.data())
def test_select_tokens_without_scores(case, data):
    row, _, _ = case
    keep = data.draw(st.integers(1, len(row)))
    diversity = data.draw(st.sampled_from([0.0, 0.1, 1.0]))  # has no meaning then
    got = select_tokens(torch.tensor([row]), None, keep, diversity)
    assert got.tolist() == [sorted(greedy(row, [], keep))]


def test_diversity_share_is_a_tenth_of_stage_1():
    # 30 tokens alike, scored best, and 10 that differ: of 20 kept, 2 must come from those
    alike = torch.ones(30, 12)
    features = torch.cat([alike, torch.eye(12)[:10]])[None]
    scores = torch.arange(40, 0, -1).float()[None]
    kept = select_tokens(features, scores, 20, 0.1)[0].tolist()
    assert kept == [*range(18), 30, 31]


@given(st.integers(0, 3), st.integers(1, 5), st.integers(0, 2), st.data())
def test_take(batch, n, extra_dims, data):
    x = torch.arange(batch * n * 2**extra_dims).reshape((batch, n) + (2,) * extra_dims)
    length = data.draw(st.integers(0, 6))
    rows = data.draw(
        st.lists(st.lists(st.integers(0, n - 1), min_size=length, max_size=length), min_size=batch, max_size=batch)
    )
    got = take(x, torch.tensor(rows, dtype=torch.long).reshape(batch, length))
    assert got.shape == (batch, length, *x.shape[2:])
    for b in range(batch):
        for slot in range(length):
            assert got[b, slot].equal(x[b, rows[b][slot]])


@st.composite
def keep_rows(draw):
    batch, n = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    return [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for _ in range(batch)]


def shorten(rows):
    """What `keep_cut` makes of a whole input, of which these tokens stay."""
    keep = torch.tensor(rows)
    where = torch.arange(keep.shape[1]).expand(keep.shape)
    whole = Cut(0, keep.shape[1], where, where, None, torch.ones_like(keep))
    return keep_cut(1, whole, keep, [sum(row) for row in rows])


@given(keep_rows())
def test_a_cut_pads_on_the_left_and_keeps_the_order(rows):
    cut = shorten(rows)
    assert cut.length == max(1, *(sum(row) for row in rows))
    kept = [[i for i, stays in enumerate(row) if stays] for row in rows]
    expected = [[-1] * (cut.length - len(own)) + own for own in kept]
    assert cut.where.tolist() == expected
    assert (cut.valid is None) == all(-1 not in row for row in expected)
    assert cut.index.tolist() == [[max(0, i) for i in row] for row in expected]
    assert cut.visual.tolist() == [[i >= 0 for i in row] for row in expected]


@given(keep_rows())
def test_restore_index_answers_for_every_old_position(rows):
    cut = shorten(rows)
    for row, got in zip(rows, restore_index(cut, len(rows[0])).tolist(), strict=True):
        padding = cut.length - sum(row)
        expected, slot = [], padding
        for position, real in enumerate(row):
            if real and any(row[:position]):
                slot += 1
            expected.append(slot if any(row) else cut.length - 1)  # a row with nothing kept has nothing to say
        assert got == expected


@given(keep_rows())
def test_what_is_cut_comes_back(rows):
    cut, keep = shorten(rows), torch.tensor(rows)
    values = torch.arange(keep.numel()).view(keep.shape)
    back = take(take(values, cut.index), restore_index(cut, keep.shape[1]))
    assert back[keep].equal(values[keep])


# ------------------------------------------------------------------ covering


def covering(features, scores, count):
    """One sample, token by token: (N, C), (N,) -> indices in the order they are chosen."""
    mean = sum(features.double()) / len(features)
    unit = [(x - mean) / max((x - mean).norm(), 1e-12) for x in features.double()]
    chosen = []
    for _ in range(count):
        worth = {}
        for i, score in enumerate(scores.double().tolist()):
            if i not in chosen:
                nearest = max([0.0, *(float(unit[i] @ unit[j]) for j in chosen)])
                worth[i] = score * max(0.0, 1 - nearest)
        chosen.append(max(worth, key=lambda i: (worth[i], -i)))
    return chosen


@given(st.lists(st.booleans(), max_size=40))
def test_true_slots_are_where_a_mask_is_true(mask):
    want = [place for place, true in enumerate(mask) if true]
    assert true_slots(torch.tensor(mask, dtype=torch.bool), len(want)).tolist() == want


@given(
    batch=st.integers(1, 3), n_tokens=st.integers(1, 12), width=st.integers(2, 5), count=st.integers(1, 12),
    seed=st.integers(0, 1 << 20),
)  # fmt: skip
def test_covering_takes_the_best_that_is_new(batch, n_tokens, width, count, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, n_tokens, width, generator=generator)
    scores = torch.rand(batch, n_tokens, generator=generator)
    count = min(count, n_tokens)
    got = covering_points(features, scores, count)
    assert got.tolist() == [covering(x, s, count) for x, s in zip(features, scores, strict=True)]


def test_covering_never_takes_a_token_twice():
    same = torch.ones(2, 6, 3)
    assert covering_points(same, torch.ones(2, 6), 6).sort(dim=1).values.tolist() == [list(range(6))] * 2
    assert covering_points(same, torch.zeros(2, 6), 6).sort(dim=1).values.tolist() == [list(range(6))] * 2


# ------------------------------------------------------------------ one operator


class Seen(TorchDispatchMode):
    """The operators that are dispatched, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


FEATURES = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(1))
SCORES = torch.rand(2, 12, generator=torch.Generator().manual_seed(2))
NONE, SEEDS = torch.empty(2, 0, dtype=torch.long), torch.tensor([[3, 1], [0, 4]])
CALLS = {
    "farthest_points": (lambda f, s: farthest_points(f, s, 4), (FEATURES, NONE)),
    "farthest_points with seeds": (lambda f, s: farthest_points(f, s, 4), (FEATURES, SEEDS)),
    "farthest_points, none to add": (lambda f, s: farthest_points(f, s, 0), (FEATURES, SEEDS)),
    "covering_points": (lambda f, s: covering_points(f, s, 6), (FEATURES, SCORES)),
    "select_tokens": (lambda f, s: select_tokens(f, s, 6, 0.4), (FEATURES, SCORES)),
    "select_tokens, none diverse": (lambda f, s: select_tokens(f, s, 6, 0.0), (FEATURES, SCORES)),
    "select_tokens, all diverse": (lambda f, s: select_tokens(f, s, 6, 1.0), (FEATURES, SCORES)),
    "select_tokens without scores": (lambda f: select_tokens(f, None, 6, 0.1), (FEATURES,)),
}
calls = pytest.mark.parametrize(("name", "call", "given"), [(name, *call) for name, call in CALLS.items()], ids=CALLS)


@calls
def test_a_selection_is_one_operator(name, call, given):
    with Seen() as seen:
        call(*given)
    assert seen.names == [f"lp_patch.{name.split()[0].rstrip(',')}.default"]


@calls
def test_a_compiler_takes_it_whole(name, call, given):
    assert torch.compile(call, backend="eager", fullgraph=True)(*given).equal(call(*given))


@calls
def test_a_tracer_takes_it_whole(name, call, given):
    traced = make_fx(call, tracing_mode="fake")(*given)
    (step,) = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert str(step).startswith("lp_patch.")
    others = [x.flip(0) for x in given]
    assert traced(*others).equal(call(*others))


@calls
def test_gradients_pass_by(name, call, given):
    learning = [x.clone().requires_grad_(x.is_floating_point()) for x in given]
    index = call(*learning)
    assert not index.requires_grad
    assert index.equal(call(*given))
    take(learning[0], index).sum().backward()
    assert learning[0].grad.count_nonzero() == index.numel() * FEATURES.shape[2]


@calls
def test_inference_mode_changes_nothing(name, call, given):
    with torch.inference_mode():
        assert call(*given).equal(call(*given))


@calls
@pytest.mark.parametrize("wide", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_choice(monkeypatch, name, call, given, dtype, wide):
    monkeypatch.setattr(select, "_wide", lambda features: wide)
    # neighbours so close that products in half precision cannot tell them apart
    features = 1 + 0.01 * torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", dtype=dtype):
        got = call(features, *given[1:])
    assert got.equal(call(features, *given[1:]))


OPERATORS = [
    (select._farthest_points, (FEATURES, NONE, 4)),
    (select._farthest_points, (FEATURES, SEEDS, 4)),
    (select._farthest_points, (FEATURES, SEEDS, 0)),
    (select._covering_points, (FEATURES, SCORES, 6)),
    (select._select_tokens, (FEATURES, SCORES, 6, 2)),
    (select._select_tokens, (FEATURES.bfloat16(), None, 6, 6)),
    (select._select_tokens, (FEATURES.clone().requires_grad_(), SCORES.clone().requires_grad_(), 6, 2)),
]


@pytest.mark.parametrize(("operator", "given"), OPERATORS)
def test_opcheck(operator, given):
    torch.library.opcheck(operator, given)


# ------------------------------------------------------------------ the kernels, where they do not run


def test_without_a_gpu_triton_is_not_asked():
    assert select._kernels(torch.device("cpu")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it works")
def test_a_triton_that_does_not_work_is_said_to():
    pytest.importorskip("triton")
    with pytest.warns(UserWarning, match="Triton is installed but does not work on cuda:0: AssertionError: Torch not"):
        assert select._kernels.__wrapped__(torch.device("cuda", 0)) is None


def test_a_build_without_triton_needs_no_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert select._kernels.__wrapped__(torch.device("cuda", 0)) is None
