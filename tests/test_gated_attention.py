"""Gated attention against the full map with a multiplied gate, value and all four gradients."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lp_patch import UnsupportedInputError
from lp_patch.training import attention, gated_attention


def eager(query, key, value, gate, scaling=None):
    """The formula as it is written, with full maps; plain autograd gives the gradients."""
    heads, length, dim = query.shape[1:]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    own = torch.eye(length, dtype=torch.bool)
    scores = (query @ key.mT * (dim**-0.5 if scaling is None else scaling)).masked_fill(later, -torch.inf)
    weight = torch.where(own, 1.0, gate[:, None, None, :])
    top = scores.masked_fill(weight == 0, -torch.inf).amax(dim=-1, keepdim=True)
    parts = (scores - top.detach()).exp() * weight
    return parts / parts.sum(dim=-1, keepdim=True) @ value


def draw(batch, kv_heads, group, length, dim, seed=0, dtype=torch.float64, scale=1.0):
    """Query, key, value, a gate of zeros, ones and values between, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, kv_heads * group, length, dim), *[(batch, kv_heads, length, dim)] * 2]
    query, key, value, upstream = (
        (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        for shape in [*shapes, shapes[0]]
    )
    kind = torch.randint(3, (batch, length), generator=generator)
    gate = torch.rand(batch, length, generator=generator, dtype=torch.float64)
    gate = gate.masked_fill(kind == 0, 0).masked_fill(kind == 1, 1).to(dtype)
    return [query, key, value, gate], upstream


def run(function, inputs, upstream, **options):
    """The output and the gradients of the four inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_close(actual, expected, rtol=1e-9):
    """Within `rtol` of each tensor's largest entry; float64 is compared to whatever dtype was computed in."""
    assert len(actual) == len(expected)
    for name, a, b in zip(("out", "query", "key", "value", "gate"), actual, expected, strict=False):
        assert a.shape == b.shape, name
        top = max(b.abs().max().item(), 1e-3) if b.numel() else 1.0
        torch.testing.assert_close(
            a.double(), b.double(), rtol=0, atol=rtol * top, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture
def block(monkeypatch):
    """Set the size of a block."""
    return lambda elements: monkeypatch.setattr(attention, "_CPU_BLOCK_ELEMENTS", elements)


# ------------------------------------------------------------------ the formula


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 11), st.integers(1, 4)),
    seed=st.integers(0, 1 << 20),
    elements=st.sampled_from([1, 40, 1 << 20]),
    scaling=st.sampled_from([None, 0.3, 2.0]),
)
@example(shape=(2, 2, 3, 11, 3), seed=1, elements=1, scaling=None)
def test_value_and_gradients_equal_the_formula(shape, seed, elements, scaling):
    inputs, upstream = draw(*shape, seed=seed)
    before, attention._CPU_BLOCK_ELEMENTS = attention._CPU_BLOCK_ELEMENTS, elements
    try:
        actual = run(gated_attention, inputs, upstream, scaling=scaling)
    finally:
        attention._CPU_BLOCK_ELEMENTS = before
    assert_close(actual, run(eager, inputs, upstream, scaling=scaling))


def test_gradcheck(block):
    block(1)
    inputs, _ = draw(2, 1, 2, 5, 2)
    gate = inputs.pop().clamp(0.1, 0.9)  # finite differences must not leave the range
    torch.autograd.gradcheck(gated_attention, [x.requires_grad_() for x in (*inputs, gate)])


def test_a_closed_gate_gets_its_gradient():
    (query, key, value, gate), upstream = draw(1, 1, 2, 6, 3)
    gate = torch.tensor([[1, 0, 1, 0, 1, 1]], dtype=gate.dtype)
    *_, actual = run(gated_attention, [query, key, value, gate], upstream)
    out = eager(query, key, value, gate)
    for j in range(6):
        # METHOD's sum, one pair at a time
        expected = torch.zeros((), dtype=torch.float64)
        for head in range(2):
            for i in range(j + 1, 6):
                seen = (query[0, head, i] @ key[0, 0, : i + 1].T * 3**-0.5).exp()
                total = sum(seen[k] * (1 if k == i else gate[0, k]) for k in range(i + 1))
                expected += seen[j] / total * (upstream[0, head, i] @ (value[0, 0, j] - out[0, head, i]))
        torch.testing.assert_close(actual[0, j], expected, rtol=1e-9, atol=1e-12)
    assert (actual[0, :5].abs() > 1e-3).all()
    assert actual[0, 5] == 0  # nobody comes after the last token


def test_a_hard_gate_equals_removing_the_tokens():
    (query, key, value, _), upstream = draw(1, 2, 2, 12, 4)
    keep = torch.tensor([0, 2, 3, 5, 8, 9, 11])
    gate = torch.zeros(1, 12, dtype=torch.float64).index_fill(1, keep, 1)
    masked_upstream = torch.zeros_like(upstream).index_copy(2, keep, upstream[:, :, keep])
    full = run(gated_attention, [query, key, value, gate], masked_upstream)
    short = [x[:, :, keep].detach().requires_grad_() for x in (query, key, value)]
    out = scaled_dot_product_attention(*short, is_causal=True, enable_gqa=True)
    grads = torch.autograd.grad(out, short, upstream[:, :, keep])
    for x, y in zip(full, (out, *grads), strict=False):
        torch.testing.assert_close(x[:, :, keep], y)
    for x in full[1:4]:
        removed = torch.ones(12, dtype=torch.bool).index_fill(0, keep, False)
        assert not x[:, :, removed].any()


def test_open_gates_equal_causal_attention():
    inputs, upstream = draw(2, 2, 2, 9, 4)
    inputs[3] = torch.ones_like(inputs[3])

    def plain(query, key, value, gate):
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True) + 0 * gate.sum()

    assert_close(run(gated_attention, inputs, upstream)[:4], run(plain, inputs, upstream)[:4])


def test_with_every_gate_closed_each_token_sees_itself():
    (query, key, value, gate), _ = draw(1, 2, 1, 7, 3)
    assert torch.equal(gated_attention(query, key, value, torch.zeros_like(gate)), value)


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    inputs, upstream = draw(2, 2, 2, 40, 8, dtype=dtype)
    wide = [x.float() for x in inputs]
    actual, expected = run(gated_attention, inputs, upstream), run(gated_attention, wide, upstream.float())
    assert [x.dtype for x in actual] == [dtype] * 5
    # the value is the float32 one, rounded once; the gradients also know the rounding of the saved output
    assert torch.equal(actual[0], expected[0].to(dtype))
    assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps)


def test_float32_is_near_float64():
    inputs, upstream = draw(2, 2, 2, 60, 8, dtype=torch.float32)
    wide = [x.double() for x in inputs]
    assert_close(run(gated_attention, inputs, upstream), run(eager, wide, upstream.double()), rtol=2e-5)


@pytest.mark.parametrize("lead", [60.0, 200.0, 600.0])
@pytest.mark.parametrize("closed", [0.0, 1e-30, 1e-44])
def test_a_closed_key_with_a_huge_score_leaves_the_others_exact(lead, closed):
    (query, key, value, gate), upstream = draw(1, 1, 2, 10, 4, dtype=torch.float32)
    gate = gate.clamp(min=0.25)
    gate[0, 3] = closed
    query[..., 0] = 1  # the last factor of every score is the key's own
    key[0, 0, 3, 0] = lead
    inputs = [query, key, value, gate]
    actual = run(gated_attention, inputs, upstream, scaling=1.0)
    expected = run(eager, [x.double() for x in inputs], upstream.double(), scaling=1.0)
    own, true = actual[4][0, 3].item(), expected[4][0, 3].item()
    actual[4][0, 3] = expected[4][0, 3] = 0
    # what sees the huge score, row 3 itself and the rows of a gate not quite closed, knows it to float32's rounding
    assert_close(actual, expected, rtol=1e-3 if closed else 2e-5)
    if closed:  # o_i is nearly v_3: a difference of nearly equal numbers, times up to 1 / gate
        assert own * closed == pytest.approx(true * closed, abs=1e-4)
    elif abs(true) < torch.finfo(torch.float32).max:
        assert own == pytest.approx(true, rel=1e-4)
    else:
        assert math.isinf(own)


def test_large_scores_do_not_overflow():
    inputs, upstream = draw(1, 2, 1, 12, 4, dtype=torch.float32, scale=5.0)
    inputs[3] = inputs[3].clamp(min=0.1)
    assert_close(run(gated_attention, inputs, upstream), run(eager, [x.double() for x in inputs], upstream), rtol=1e-3)


def test_autocast_changes_nothing():
    inputs, upstream = draw(1, 2, 2, 20, 8, dtype=torch.float32)
    expected = run(gated_attention, inputs, upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(gated_attention, inputs, upstream)
    assert all(map(torch.equal, actual, expected))


def test_dtypes_that_autocast_mixes():
    (query, key, value, gate), upstream = draw(1, 2, 2, 20, 8, dtype=torch.float32)
    inputs = [query, key, value.bfloat16(), gate.half()]
    actual = run(gated_attention, inputs, upstream)
    assert [x.dtype for x in actual] == [torch.float32] * 3 + [torch.bfloat16, torch.float16]
    assert_close(actual, run(eager, [x.double() for x in inputs], upstream.double()), rtol=1e-2)
    inputs = [query, key, value, gate.double()]
    actual = run(gated_attention, inputs, upstream)
    assert [x.dtype for x in actual] == [torch.float32] * 4 + [torch.float64]
    assert_close(actual, run(eager, [x.double() for x in inputs], upstream.double()), rtol=2e-5)


# ------------------------------------------------------------------ memory and layout


class Largest(TorchDispatchMode):
    """The most elements that any operation put out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_no_full_map_is_ever_held(block):
    def largest(function, length):
        inputs, upstream = draw(1, 1, 2, length, 4, dtype=torch.float32)
        leaves = [x.requires_grad_() for x in inputs]
        with Largest() as forward:
            out = function(*leaves)
        with Largest() as backward:
            out.backward(upstream)
        return forward.elements, backward.elements

    assert min(largest(eager, 256)) >= 2 * 256**2  # the recorder sees both passes
    assert max(largest(gated_attention, 2048)) <= attention._CPU_BLOCK_ELEMENTS < 2048**2
    block(1)
    assert largest(gated_attention, 512) == (2 * 4 * 512,) * 2  # as large as the query: linear
    assert largest(gated_attention, 1024) == (2 * 4 * 1024,) * 2


def test_the_block_size_changes_nothing(block):
    inputs, upstream = draw(2, 2, 2, 37, 3)
    expected = run(gated_attention, inputs, upstream)
    for elements in (1, 8 * 37 * 5, 8 * 37 * 36):
        block(elements)
        assert_close(run(gated_attention, inputs, upstream), expected, rtol=1e-12)


def test_inputs_need_not_be_contiguous():
    inputs, upstream = draw(2, 2, 2, 13, 4)
    expected = run(gated_attention, inputs, upstream)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    views.append(torch.stack([inputs[3], inputs[3]], dim=2)[..., 0])
    assert not any(x.is_contiguous() for x in views)
    actual = run(gated_attention, views, upstream.transpose(1, 2).contiguous().transpose(1, 2))
    assert_close(actual, expected, rtol=1e-12)
    # a sum sends back one number, expanded
    ones = torch.ones_like(upstream)
    assert_close(run(gated_attention, views, ones[:1, :1, :1, :1].expand_as(ones)), run(eager, inputs, ones))


def test_only_the_gate_needs_a_gradient():
    (query, key, value, gate), upstream = draw(1, 2, 1, 8, 4)
    *_, expected = run(eager, [query, key, value, gate], upstream)
    gate.requires_grad_()
    gated_attention(query, key, value, gate).backward(upstream)
    torch.testing.assert_close(gate.grad, expected)
    assert query.grad is None
    with torch.no_grad():
        assert not gated_attention(query, key, value, gate).requires_grad


def test_under_activation_checkpointing():
    inputs, upstream = draw(1, 2, 2, 8, 4)
    actual = run(lambda *leaves: checkpoint(gated_attention, *leaves, use_reentrant=False), inputs, upstream)
    assert_close(actual, run(gated_attention, inputs, upstream), rtol=1e-12)


@pytest.mark.parametrize("shape", [(0, 2, 2, 5, 3), (2, 2, 2, 0, 3)])
def test_empty_inputs(shape):
    inputs, upstream = draw(*shape)
    for grad, x in zip(run(gated_attention, inputs, upstream)[1:], inputs, strict=True):
        assert grad.shape == x.shape


# ------------------------------------------------------------------ refusals


def test_a_second_derivative_is_refused():
    inputs, upstream = draw(1, 1, 1, 4, 2)
    leaves = [x.requires_grad_() for x in inputs]
    (grad,) = torch.autograd.grad(gated_attention(*leaves), leaves[:1], upstream.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, g: (q[0], k, v, g), r"query \(4, 6, 3\)"),
        (lambda q, k, v, g: (q, k, v, g[:, None]), r"gate \(2, 1, 6\)"),
        (lambda q, k, v, g: (q, k, v, g[:, :5]), r"gate \(2, 5\)"),
        (lambda q, k, v, g: (q, k, v, g[:1]), r"gate \(1, 6\)"),
        (lambda q, k, v, g: (q[:, :3], k, v, g), "KV dividing H"),
        (lambda q, k, v, g: (q, k[:, :0], v[:, :0], g), "KV dividing H"),
        (lambda q, k, v, g: (q, k[:, :1], v, g), "KV dividing H"),
        (lambda q, k, v, g: (q[:, :, 1:], k, v, g), r"query \(2, 4, 5, 3\)"),
        (lambda q, k, v, g: (q, k[..., :2], v[..., :2], g), r"key \(2, 2, 6, 2\)"),
        (lambda q, k, v, g: (q, k, v, g > 0.5), r"gate torch.bool.*\.float\(\)"),
        (lambda q, k, v, g: (q, k.long(), v, g), "key torch.int64"),
        (lambda q, k, v, g: (q.to(torch.complex64), k, v, g), "query torch.complex64"),
        (lambda q, k, v, g: (q.float(), k, v, g), "float64 together"),
        (lambda q, k, v, g: (q, k, v.half(), g), "float64 together"),
    ],
)
def test_wrong_inputs_are_refused(change, message):
    inputs, _ = draw(2, 2, 2, 6, 3)
    with pytest.raises(UnsupportedInputError, match=message):
        gated_attention(*change(*inputs))


def test_the_difference_is_what_opening_a_key_gives_each_query():
    """One layer, gates of 0 and 1: every query's output with the key open less that with it closed, for each key."""
    (query, key, value, _), upstream = draw(2, 2, 2, 9, 3, seed=5, scale=2.0)
    gate = torch.randint(2, (2, 9), generator=torch.Generator().manual_seed(0)).double()
    want = torch.zeros_like(gate)
    for row in range(2):
        for at in range(9):
            outputs = []
            for value_of_gate in (1.0, 0.0):
                other = gate.clone()
                other[row, at] = value_of_gate
                outputs.append(eager(query, key, value, other))
            want[row, at] = ((outputs[0] - outputs[1]) * upstream).sum()
    exact = run(gated_attention, [query, key, value, gate], upstream)
    got = run(gated_attention, [query, key, value, gate], upstream, difference=True)
    torch.testing.assert_close(got[4], want)
    assert_close(got[:4], exact[:4])


def test_the_difference_is_bounded_where_the_derivative_is_not():
    query, key, value = torch.ones(1, 1, 2, 1) * 40, torch.tensor([[40.0], [0.0]])[None, None], torch.rand(1, 1, 2, 1)
    gate = torch.tensor([[0.0, 1.0]])
    upstream = torch.ones(1, 1, 2, 1)
    assert run(gated_attention, [query, key, value, gate], upstream)[4].abs().max() > 1e9
    assert run(gated_attention, [query, key, value, gate], upstream, difference=True)[4].abs().max() <= 1
