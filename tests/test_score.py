"""Received attention against a full softmax in plain Python floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lp_patch import score
from lp_patch.score import received_attention

settings.register_profile("steady", deadline=None, derandomize=True)  # a loaded machine is no failure
settings.load_profile("steady")


def loop(query, key, weight, scaling, mask=None, causal=True):
    """One head, one query, one key at a time."""
    heads, n_queries, _ = query.shape
    kv_heads, n_keys, _ = key.shape
    q, k, w = query.tolist(), key.tolist(), weight.tolist()
    total = [0.0] * n_keys
    for h in range(heads):
        shared = k[h * kv_heads // heads]
        for i in range(n_queries):
            own = mask[i] if mask is not None and isinstance(mask[0], list) else mask
            seen = [j for j in range(n_keys) if (not causal or j <= n_keys - n_queries + i) and (own is None or own[j])]
            if not seen:
                continue
            logits = [scaling * sum(a * b for a, b in zip(q[h][i], shared[j], strict=True)) for j in seen]
            top = max(logits)
            parts = [math.exp(x - top) for x in logits]
            for j, part in zip(seen, parts, strict=True):
                total[j] += w[i] * part / sum(parts) / heads
    return total


def draw(batch, heads, kv_heads, n_queries, n_keys, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(batch, heads, n_queries, dim, generator=generator)
    key = 2 * torch.randn(batch, kv_heads, n_keys, dim, generator=generator)
    weight = torch.rand(batch, n_queries, generator=generator)
    return query, key, weight / weight.sum(dim=1, keepdim=True)


def check(query, key, weight, scaling=0.5, mask=None, causal=True):
    got = received_attention(query, key, weight, scaling, key_mask=mask, causal=causal)
    assert got.dtype == torch.float32
    expected = [
        loop(query[b], key[b], weight[b], scaling, None if mask is None else mask[b].tolist(), causal)
        for b in range(query.shape[0])
    ]
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    return got


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
def test_grouped_heads(kv_heads, causal):
    check(*draw(2, 6, kv_heads, 5, 5), causal=causal)


@given(
    st.integers(1, 3), st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1)]), st.integers(1, 5), st.integers(0, 4),
    st.booleans(), st.integers(0, 99), st.sampled_from([0.25, 1.0, 3.0]),
)  # fmt: skip
def test_any_shape_with_a_past(batch, heads, n_queries, past, causal, seed, scaling):
    check(*draw(batch, *heads, n_queries, n_queries + past, seed=seed), scaling=scaling, causal=causal)


def test_each_query_sees_the_past_and_itself():
    # all logits equal: query i of 3 spreads its weight over the 2 + i + 1 keys it sees
    query, key = torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 5, 4)
    got = received_attention(query, key, torch.tensor([[0.0, 0.75, 0.25]]), 1.0)
    expected = [0.75 / 4 + 0.25 / 5] * 4 + [0.25 / 5]
    torch.testing.assert_close(got, torch.tensor([expected]))


def test_left_padding():
    query, key, weight = draw(3, 4, 2, 6, 8, seed=1)
    padding = torch.tensor([0, 3, 5])
    mask = torch.arange(8) >= padding[:, None]
    weight = weight * mask[:, -6:]
    got = check(query, key, weight, mask=mask)
    assert not got[~mask].any()
    for row, start in enumerate(padding.tolist()):
        cut = max(start - 2, 0)  # the same row without its padding
        alone = received_attention(
            query[row : row + 1, :, cut:], key[row : row + 1, :, start:], weight[row : row + 1, cut:], 0.5
        )
        torch.testing.assert_close(got[row : row + 1, start:], alone)


def test_queries_that_see_nothing_give_nothing():
    query, key, weight = draw(2, 2, 2, 4, 4, seed=2)
    mask = torch.tensor([[False, False, True, True], [False, False, False, False]])
    got = check(query, key, weight, mask=mask)  # the first two queries of row 0 have weight, and see nothing
    torch.testing.assert_close(got.sum(dim=1), torch.stack([weight[0, 2:].sum(), torch.tensor(0.0)]))


@pytest.mark.parametrize("elements", [1, 50, 1 << 24])
@pytest.mark.parametrize("causal", [True, False])
def test_each_query_has_a_mask_of_its_own(monkeypatch, causal, elements):
    """Windows and blocks: (B, Q, K), also where queries come in several blocks; one sees nothing."""
    monkeypatch.setattr(score, "_CHUNK_ELEMENTS", elements)
    query, key, weight = draw(2, 4, 2, 5, 8, seed=6)
    mask = torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(6)) > 0.4
    mask[1, 2] = False
    check(query, key, weight, mask=mask, causal=causal)


def test_weights_choose_the_queries():
    query, key, _ = draw(1, 2, 1, 4, 6, seed=3)
    one = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    got = check(query, key, one)
    wild = query.clone()
    wild[:, :, [0, 1, 3]] = 1e4
    torch.testing.assert_close(received_attention(wild, key, one, 0.5), got, rtol=0, atol=0)
    assert not received_attention(query, key, torch.zeros(1, 4), 0.5).any()


def test_a_mean_of_queries_is_a_distribution():
    query, key, weight = draw(2, 4, 2, 7, 9, seed=4)
    torch.testing.assert_close(received_attention(query, key, weight, 0.5).sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("elements", [1, 50, 130])
def test_blocks_change_nothing(monkeypatch, elements):
    query, key, weight = draw(2, 4, 2, 9, 11, seed=5)
    mask = torch.arange(11) >= torch.tensor([[0], [4]])
    monkeypatch.setattr(score, "_CHUNK_ELEMENTS", elements)
    check(query, key, weight, mask=mask)
    check(query, key, weight, causal=False)


def test_no_block_outgrows_the_limit(monkeypatch):
    sizes = []
    real = torch.Tensor.softmax
    monkeypatch.setattr(score, "_CHUNK_ELEMENTS", 200)
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: sizes.append(x.numel()) or real(x, dim=dim))
    received_attention(*draw(2, 4, 2, 9, 11), 0.5)
    assert len(sizes) == 5  # 2 * 4 * 11 logits a query: two queries at a time
    assert max(sizes) <= 200


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_scored_in_float32(dtype):
    query, key, weight = (x.to(dtype) for x in draw(2, 4, 2, 5, 9, dim=16, seed=6))
    check(query, key, weight)  # at float32's tolerance
    same = received_attention(query.float(), key.float(), weight.float(), 0.5)
    assert received_attention(query, key, weight, 0.5).equal(same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    given = draw(2, 4, 2, 5, 9, dim=16, seed=7)
    with torch.autocast("cpu", dtype=dtype):
        got = received_attention(*given, 0.5)
    assert got.equal(received_attention(*given, 0.5))


def test_large_logits():
    # 240 ** 2 * 16 overflows float16, and exp of it every float: only the differences count
    key = torch.full((1, 1, 3, 16), 240.0)
    key[0, 0, 1, 0] = 241.0
    check(torch.full((1, 1, 1, 16), 240.0), key, torch.ones(1, 1), scaling=1 / 64)
    check(torch.full((1, 1, 1, 16), 240.0).half(), key.half(), torch.ones(1, 1), scaling=1 / 64)
