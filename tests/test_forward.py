"""A patched forward against the oracle: what is kept, and every number that comes out."""

import pytest
import torch
from oracle import expected
from tiny import WIDTH, N, batch, features_shown, images, tiny_llava, tokens

import lp_patch

CASES = {
    "default": {},
    "tokens": {"tokens": 5},
    "cls": {"tokens": 5, "scorer": "cls"},
    "cls, all diverse": {"tokens": 5, "scorer": "cls", "diversity": 1.0},
    "cls, none diverse": {"tokens": 5, "scorer": "cls", "diversity": 0.0},
    "learned": {"tokens": 5, "scorer": "learned"},
    "stage 1 alone": {"tokens": 9, "stage_ratio": 1.0},
    "stage 2 alone": {"tokens": 30, "stage_ratio": 3.0},
    "other layer": {"tokens": 6, "layer": 4, "stage_ratio": 2.0},
    "first layer": {"tokens": 6, "layer": 1},
    "last layer": {"tokens": 6, "layer": 5},
    "wipe": {"tokens": 4, "wipe": 4},
    "wipe of the last layer": {"tokens": 4, "wipe": 5},
    "compact": {"tokens": 5, "positions": "compact"},
    "one token": {"tokens": 1},
    "full": {"tokens": N},
    "more than full": {"ratio": 1.0},
}


# transformers' eager softmax runs in float32, where a fully masked float64 row is NaN, patched or not
DTYPES = {"sdpa": torch.float64, "eager": torch.float32}


def make_pruner(seed=3):
    torch.manual_seed(seed)
    return lp_patch.LearnablePruner(WIDTH, 16).double().eval()


def split_options(case):
    """The case's options as lp_patch takes them, and as the oracle does."""
    ours, theirs = dict(case), dict(case)
    if "wipe" in ours:
        ours["final_wipe_layer"] = ours.pop("wipe")
    if ours.get("scorer") == "learned":
        ours["pruner"] = theirs["pruner"] = make_pruner()
    return ours, theirs


def check(patch, logits, row, want):
    assert patch.trace.stage1[row].tolist() == want.stage1
    assert patch.trace.stage2[row].tolist() == want.stage2
    torch.testing.assert_close(logits, want.logits, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_row(case, kv_heads, attention):
    model = tiny_llava(seed=kv_heads, kv_heads=kv_heads, attention=attention, dtype=DTYPES[attention])
    ours, theirs = split_options(case)
    ids, pixels = tokens(4, "image", 7, seed=1), images(1, dtype=DTYPES[attention])
    want = expected(model, ids, pixels, **theirs)
    with lp_patch.applied(model, **ours) as patch, torch.no_grad():
        out = model(**batch([ids], pixels))
    check(patch, out.logits[0], 0, want)
    assert patch.trace.visual_tokens == [N]
    if want.scores1:
        torch.testing.assert_close(patch.trace.stage1_scores[0].tolist(), want.scores1, rtol=1e-5, atol=1e-7)
    if want.scores2:
        got = dict(zip(want.stage1, patch.trace.stage2_scores[0].tolist(), strict=True))
        assert got == pytest.approx(want.scores2, rel=1e-5)


ROWS = {
    "different text": [(3, "image", 9), (5, "image", 2)],
    "different images": [(3, "image", 9), (2, "image", 4, "image", 3), (6,)],
    "adjacent images": [("image", "image", 5), (1, "image", 4)],
    "no text after": [(4, "image"), (2, "image", 3)],
    "text before only in one": [(30, "image", 1), ("image", 8)],
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["tokens", "cls", "wipe", "compact", "stage 1 alone", "stage 2 alone", "learned"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_rows_equal_themselves_alone(rows, case, side, attention):
    model = tiny_llava(seed=5, kv_heads=2, attention=attention, dtype=DTYPES[attention])
    ours, theirs = split_options(CASES[case])
    prompts = [tokens(*row, seed=i) for i, row in enumerate(rows)]
    counts = [row.count("image") for row in rows]
    pixels = images(sum(counts), dtype=DTYPES[attention])
    inputs = batch(prompts, pixels, side)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with lp_patch.applied(model, **ours) as patch, torch.no_grad():
        out = model(**inputs)
    for i, (ids, own) in enumerate(zip(prompts, pixels.split(counts), strict=True)):
        want = expected(model, ids, own, **theirs)
        check(patch, out.logits[i][inputs["attention_mask"][i].bool()], i, want)


@pytest.mark.parametrize("rows", [[(3, "image", 9)], [(3, "image", 9), (2, "image", 4, "image", 3), (6,)]])
def test_hidden_states_have_the_inputs_length(rows):
    model = tiny_llava(seed=2)
    prompts = [tokens(*row, seed=i) for i, row in enumerate(rows)]
    counts = [row.count("image") for row in rows]
    pixels = images(sum(counts))
    inputs = batch(prompts, pixels)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with lp_patch.applied(model, tokens=4, final_wipe_layer=4), torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    for i, (ids, own) in enumerate(zip(prompts, pixels.split(counts), strict=True)):
        want = expected(model, ids, own, tokens=4, wipe=4)
        real = inputs["attention_mask"][i].bool()
        assert len(out.hidden_states) == len(want.hidden)
        for got, states in zip(out.hidden_states, want.hidden, strict=True):
            torch.testing.assert_close(got[i][real], states, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize(
    "options", [{"tokens": N}, {"ratio": 1.0}, {"tokens": 10_000}, {"tokens": N, "final_wipe_layer": 4}]
)
@pytest.mark.parametrize("scorer", ["diversity", "cls", "random", "uniform"])
def test_full_budget_is_untouched_bit_for_bit(options, scorer):
    model = tiny_llava(dtype=torch.float32)
    inputs = batch([tokens(3, "image", 9), tokens(1, "image", 4)], images(2, dtype=torch.float32))
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True)
        with lp_patch.applied(model, scorer=scorer, **options) as patch:
            got = model(**inputs, output_hidden_states=True)
    assert torch.equal(got.logits, want.logits)
    assert all(map(torch.equal, got.hidden_states, want.hidden_states))
    assert torch.equal(features_shown(got), features_shown(want))
    assert [len(x) for x in patch.trace.stage2] == [N, N]
    assert patch.report().flops_ratio == 1.0


def test_text_only_prompts_are_untouched_bit_for_bit():
    model = tiny_llava(dtype=torch.float32)
    inputs = batch([tokens(9), tokens(4)], None)
    with torch.no_grad():
        want = model(**inputs).logits
        with lp_patch.applied(model, tokens=4) as patch:
            got = model(**inputs).logits
    assert torch.equal(got, want)
    assert patch.trace.visual_tokens == [0, 0]
    assert "no visual tokens" in str(patch.report())


def test_trace_belongs_to_the_latest_prefill():
    model = tiny_llava()
    with lp_patch.applied(model, tokens=5) as patch, torch.no_grad():
        assert patch.trace is None
        assert "no prefill yet" in str(patch.report())
        model(**batch([tokens(2, "image", 3)], images(1)))
        first = patch.trace
        model(**batch([tokens(2, "image", 3), tokens("image", 3)], images(2, seed=4)))
        assert len(first.stage1) == 1 and len(patch.trace.stage1) == 2
        model(**batch([tokens(6)], None))
        assert patch.trace.visual_tokens == [0]


def test_loss_is_that_of_the_kept_tokens():
    """What labels mark as an answer does not ask: the prompt, which ends in the image, asks with its last token."""
    model = tiny_llava()
    ids, pixels = tokens(3, "image", 9), images(1)
    labels = torch.tensor([ids])
    labels[0, : 3 + N] = -100
    with lp_patch.applied(model, tokens=5), torch.no_grad():
        out = model(**batch([ids], pixels), labels=labels)
    want = expected(model, ids, pixels, tokens=5, turns=[3 + N]).logits
    loss = torch.nn.functional.cross_entropy(want[2 + N : -1], labels[0, 3 + N :])
    assert float(out.loss) == pytest.approx(float(loss), rel=1e-5)


def test_logits_to_keep_and_tuples():
    model = tiny_llava()
    inputs = batch([tokens(3, "image", 9)], images(1))
    with lp_patch.applied(model, tokens=5), torch.no_grad():
        full = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, full[:, -2:])
        torch.testing.assert_close(model(**inputs, return_dict=False)[0], full)


def test_image_features_shown_are_the_survivors():
    model = tiny_llava()
    inputs = batch([tokens(3, "image", 9)], images(1))
    with lp_patch.applied(model, tokens=5) as patch, torch.no_grad():
        out = model(**inputs)
        outputs = [model(**inputs, return_dict=False), model.model(**inputs, return_dict=False)]
    shown = features_shown(out)
    assert shown.shape[0] == len(patch.trace.stage1[0])
    assert shown.isfinite().all()
    for output in outputs:
        held = [x for x in _tensors(output) if x.shape[-1] == shown.shape[-1]]
        assert all(x.isfinite().all() for x in held)
        assert any(torch.equal(x, shown) for x in held)


def _tensors(value):
    """Every tensor in nested tuples and lists."""
    if isinstance(value, (tuple, list)):
        return [x for part in value for x in _tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def test_gradients_flow_through_the_survivors():
    model = tiny_llava()
    inputs = batch([tokens(3, "image", 9)], images(1))
    with lp_patch.applied(model, tokens=5):
        model(**inputs).logits[0, -1].sum().backward()
    gradient = model.model.multi_modal_projector.linear_1.weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
