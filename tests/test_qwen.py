"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and its mixture of experts, patched, against the masked oracle."""

import pytest
import torch
from masked import expected
from tiny_qwen import HIDDEN, KINDS, LAYERS, PAD, batch, prompt, tiny_qwen, visual

import lp_patch

NEW = 4
CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}  # norms and softmaxes of these models are float32
CASES = {
    "tokens": {"tokens": 4, "layer": 2},
    "ratio": {"ratio": 1 / 3, "layer": 3, "stage_ratio": 2.0},
    "learned": {"ratio": 1 / 4, "layer": 2, "pruner": True},
    "stage 1 alone": {"ratio": 1 / 4, "stage_ratio": 1.0},
    "stage 2 alone": {"tokens": 8, "layer": 2, "stage_ratio": 6.0},
    "wipe": {"tokens": 3, "layer": 2, "wipe": 4},
}
MIXED = [
    (3, ("image", 3, 4), 5, ("video", 3, 2, 2), 4),
    (2, ("image", 4, 2), 1, ("image", 5, 5), 3),
    (6,),
]


def rows_of(kind, parts=MIXED):
    return [prompt(kind, *row, seed=i) for i, row in enumerate(parts)]


def split_options(case):
    """The case's options as lp_patch takes them, and as the oracle does."""
    ours, theirs = dict(case), dict(case)
    if "wipe" in ours:
        ours["final_wipe_layer"] = ours.pop("wipe")
    if "pruner" in ours:
        torch.manual_seed(3)
        ours["pruner"] = theirs["pruner"] = lp_patch.LearnablePruner(HIDDEN, 16).double().eval()
    return ours, theirs


def oracle(model, inputs, where, **options):
    language_model = model.model.language_model
    return expected(model, language_model.layers, language_model, inputs, where, **options)


def check_sets(trace, want):
    assert [x.tolist() for x in trace.stage1] == want.stage1
    assert [x.tolist() for x in trace.stage2] == want.stage2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind, case, side):
    model = tiny_qwen(kind, seed=1)
    ours, theirs = split_options(CASES[case])
    rows = rows_of(kind)
    inputs = batch(rows, side=side)
    want = oracle(model, inputs, visual(rows, side), **theirs)
    with lp_patch.applied(model, **ours) as patch, torch.no_grad():
        out = model(**inputs)
        check_sets(patch.trace, want)
        torch.testing.assert_close(out.logits[want.left], want.logits[want.left], **CLOSE)
        print("largest", kind, case, float((out.logits - want.logits)[want.left].abs().max()))
        for i, row in enumerate(rows):
            alone = model(**batch([row])).logits[0]
            torch.testing.assert_close(out.logits[i][inputs["attention_mask"][i].bool()], alone, **CLOSE)
            assert patch.trace.stage2[0].tolist() == want.stage2[i]


def generate(model, inputs, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def follow(rows, out, width):
    """The inputs of a forward on everything that was generated, each row as often as it was returned."""
    times = out.sequences.shape[0] // len(rows)
    grown = []
    for i, sequence in enumerate(out.sequences):
        row = rows[i // times]
        new = sequence[width:].tolist()
        grown.append({**row, "ids": row["ids"] + new, "types": row["types"] + [0] * len(new)})
    return grown


@pytest.mark.parametrize("case", ["tokens", "wipe", "stage 1 alone"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_generate(kind, beams, case):
    model = tiny_qwen(kind, seed=2)
    ours, theirs = split_options(CASES[case])
    rows = rows_of(kind)
    inputs = batch(rows)
    width = inputs["input_ids"].shape[1]
    search = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": 0.0} if beams > 1 else {}
    with lp_patch.applied(model, **ours) as patch:
        out = generate(model, inputs, output_scores=True, **search)
    grown = follow(rows, out, width)
    want = oracle(model, batch(grown), visual(grown), end=width, **theirs)
    check_sets(patch.trace, want)
    steps = want.logits[:, width - 1 : -1]
    if beams == 1:
        torch.testing.assert_close(torch.stack(out.logits, dim=1), steps, **CLOSE)
        print("largest", kind, case, float((torch.stack(out.logits, dim=1) - steps).abs().max()))
        return
    # a beam's score is the oracle's log-likelihood of what it says
    likely = steps.log_softmax(-1).gather(2, out.sequences[:, width:, None]).sum(dim=(1, 2))
    torch.testing.assert_close(out.sequences_scores, likely, **CLOSE)
