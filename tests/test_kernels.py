"""The Triton kernels on a CPU: run in Triton's interpreter against their reference, and compiled for real devices.

The interpreter is chosen when Triton is imported, so the tests that run in it are run in a process of their own.
"""

import os
import re
import subprocess
import sys
import types

import pytest
import torch

triton = pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from test_select import EXACT, greedy, rows_and_seeds
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lp_patch import kernels, select
from lp_patch.select import covering_points, farthest_points, select_tokens, take, top_indices

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in test_in_the_interpreter's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@compiled
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "passed" in ran.stdout


# ------------------------------------------------------------------ compiled, for devices that are not here


@pytest.fixture
def compile_for(monkeypatch, tmp_path):
    """Makes launches compile for an NVIDIA device of a capability, as they would there, and go no further."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    before = dict(vars(driver))

    def choose(capability):
        number = 10 * capability[0] + capability[1]
        device = types.SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", number, 32),
            get_current_device=lambda: number,  # Triton keeps what it built by device
            get_current_stream=lambda device: 0,
        )
        driver.set_active(device)

    yield choose
    vars(driver).clear()
    vars(driver).update(before)


@compiled
@pytest.mark.parametrize("capability", [(7, 5), pytest.param((8, 0), marks=pytest.mark.long), (9, 0)])
def test_cosines_compile(compile_for, capability):
    compile_for(capability)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        features, table = torch.empty(2, 96, 128, dtype=dtype), torch.empty(2, 96, 96)
        settings = kernels.cosines_settings(dtype, capability)
        built = kernels._cosines.warmup(features, table[:, 0], table, 96, 128, grid=(8,), **settings)
        # an L40 has 99 KiB, a T4 64
        assert built.metadata.shared <= 64 * 1024
        # tensor cores multiply, in the precision that was asked for
        if capability >= (8, 0):
            kind = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "tf32"}[dtype]
            assert re.search(rf"mma.*{kind}", built.asm["ptx"])


@compiled
@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
@pytest.mark.parametrize("n_tokens", [1, 576, 577, 2880, select._KERNEL_TOKENS])
def test_greedy_compiles(compile_for, capability, n_tokens):
    compile_for(capability)
    table = torch.empty(1, 1, n_tokens)
    for scored in (False, True):
        build = kernels.greedy_settings(n_tokens, scored)
        one, many = (
            kernels._greedy.warmup(table, table, table, table.long(), n_tokens, count, grid=(1,), **build)
            for count in (1, 48)
        )
        assert one is many  # another count is no new kernel


# ------------------------------------------------------------------ in the interpreter


@pytest.fixture
def with_kernels(monkeypatch):
    monkeypatch.setattr(select, "_kernels", lambda device: kernels)


def draw(batch, n_tokens, width, seed, dtype=torch.float32):
    """(B, N, C), a third of the tokens copies of others."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, n_tokens, width, generator=generator)
    origin = torch.randint(0, n_tokens, (batch, n_tokens), generator=generator)
    own = torch.rand(batch, n_tokens, generator=generator) > 1 / 3
    return take(features, torch.where(own, torch.arange(n_tokens), origin)).to(dtype)


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 150), st.sampled_from([1, 7, 32, 100]))


@interpreted
@settings(max_examples=40)
@given(SIZES, st.integers(0, 99), st.sampled_from(DTYPES))
def test_cosines(size, seed, dtype):
    features = draw(*size, seed, dtype)
    table = kernels.cosines(features, select._scale(features))
    torch.testing.assert_close(table, select.cosines(features), rtol=0, atol=1e-6)
    assert table.equal(table.transpose(1, 2))
    # rows are what they are alone; copies have the same cosines wherever they stand
    alone = [kernels.cosines(x[None], select._scale(x[None])) for x in features]
    assert table.equal(torch.cat(alone))
    order = torch.randperm(size[1], generator=torch.Generator().manual_seed(seed))
    moved = features[:, order]
    assert kernels.cosines(moved, select._scale(moved)).equal(table[:, order][:, :, order])


@interpreted
@settings(max_examples=40)
@given(SIZES, st.integers(0, 99), st.sampled_from([None, "coarse", "fine"]), st.data())
def test_the_loop(size, seed, scores, data):
    features = draw(*size, seed)
    count = data.draw(st.integers(0, size[1]))
    generator = torch.Generator().manual_seed(seed)
    worth = None if scores is None else torch.rand(size[:2], generator=generator)
    if scores == "coarse":  # ties, and nothing to win
        worth = (3 * worth).floor()
    cosines = select._Cosines(features, whole=True)
    nearest = (
        cosines.of(torch.zeros(size[0], 1, dtype=torch.long)).squeeze(1) if scores is None else torch.zeros(size[:2])
    )
    if scores is None:
        nearest[:, 0], count = torch.inf, min(count, size[1] - 1)
    got = kernels.greedy(cosines.table, nearest, worth, count)
    assert got.dtype == torch.int64
    assert got.equal(select._greedy(cosines, nearest, worth, count))


@interpreted
@settings(max_examples=60)
@given(rows_and_seeds(vectors=EXACT, max_tokens=12))
def test_farthest_points_with_ties(case):
    row, seeds, count = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_kernels", lambda device: kernels)
        got = farthest_points(torch.tensor([row]), torch.tensor([seeds], dtype=torch.long), count)
    assert got.tolist() == [greedy(row, seeds, count)]


@interpreted
@pytest.mark.parametrize(
    ("n_tokens", "keep", "dtype"),
    [
        *((1, 1, dtype) for dtype in DTYPES),
        *((2, 1, dtype) for dtype in DTYPES),
        *((64, 20, dtype) for dtype in DTYPES),
        *((65, 30, dtype) for dtype in DTYPES),
        (300, 60, torch.bfloat16),
        (320, 32, torch.float32),
    ],
)
def test_whole_selections(with_kernels, monkeypatch, n_tokens, keep, dtype):
    features = draw(2, n_tokens, 48, n_tokens, dtype)
    features[1, n_tokens // 2] = 0
    scores = torch.rand(2, n_tokens, generator=torch.Generator().manual_seed(keep))
    seeds = top_indices(scores, keep // 2)
    calls = [
        lambda at: farthest_points(features[at], seeds[at], keep - keep // 2),
        lambda at: covering_points(features[at], scores[at], keep),
        lambda at: select_tokens(features[at], scores[at], keep, 0.3),
        lambda at: select_tokens(features[at], None, keep, 0.3),
    ]
    both = [call(slice(None)) for call in calls]
    alone = [torch.cat([call([b]) for b in range(2)]) for call in calls]
    monkeypatch.undo()  # from here on, the reference
    assert select._kernels(features.device) is None
    for got, single, call in zip(both, alone, calls, strict=True):
        assert got.equal(call(slice(None)))
        assert single.equal(got)


@interpreted
def test_rows_in_groups(with_kernels, monkeypatch):
    features, none = draw(5, 20, 16, 0), torch.empty(5, 0, dtype=torch.long)
    scores = torch.rand(5, 20)
    want = farthest_points(features, none, 9), covering_points(features, scores, 9)
    monkeypatch.setattr(select, "_KERNEL_ELEMENTS", 1000)  # two rows
    monkeypatch.setattr(select, "_CHUNK_ELEMENTS", 200)  # and five tokens of each
    assert farthest_points(features, none, 9).equal(want[0])
    assert covering_points(features, scores, 9).equal(want[1])
    monkeypatch.setattr(select, "_KERNEL_TOKENS", 19)  # too long for them
    monkeypatch.setattr(kernels, "greedy", None)
    assert farthest_points(features, none, 9).equal(want[0])


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy
def test_tokens_that_are_not_finite(with_kernels):
    features = torch.eye(4).repeat(1, 2, 1)
    features[0, 3, 1], features[0, 6] = torch.nan, torch.inf
    nothing = features.clone()
    nothing[0, [3, 6]] = 0
    assert farthest_points(features, torch.empty(1, 0, dtype=torch.long), 8).tolist() == [
        greedy(nothing[0].tolist(), [], 8)
    ]
    scores = torch.rand(1, 8)
    scores[0, 5] = torch.nan
    assert sorted(covering_points(features, scores, 8)[0].tolist()) == list(range(8))


@interpreted
@pytest.mark.parametrize("scored", [False, True])
def test_the_loop_over_five_tiles(scored):
    cosines = select._Cosines(draw(1, 2880, 64, 1, torch.bfloat16), whole=True)
    nearest, scores = torch.zeros(1, 2880), None
    if scored:
        scores = torch.rand(1, 2880, generator=torch.Generator().manual_seed(1))
    else:
        nearest = cosines.nearest(torch.arange(256)[None])
        nearest[:, :256] = torch.inf
    assert kernels.greedy(cosines.table, nearest, scores, 285).equal(select._greedy(cosines, nearest, scores, 285))
