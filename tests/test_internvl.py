"""InternVL, patched, against the masked oracle: tiles of one image share its budget."""

import pytest
import torch
from oracle import budget
from test_qwen import CLOSE, check_second_image, check_sets, generate, oracle, split_options
from tiny import CACHE, features_shown
from tiny_internvl import HIDDEN, LAYERS, N, batch, prompt, tiny_internvl, visual

import lp_patch

CASES = {
    "tokens": {"tokens": 4, "layer": 2},
    "ratio": {"ratio": 1 / 3, "layer": 3, "stage_ratio": 2.0},
    "learned": {"ratio": 1 / 4, "layer": 2, "pruner": True},
    "stage 1 alone": {"ratio": 1 / 4, "stage_ratio": 1.0},
    "stage 2 alone": {"tokens": 6, "layer": 2, "stage_ratio": 9.0},
    "wipe": {"tokens": 3, "layer": 2, "wipe": 4},
}
MIXED = [
    (3, ("image", 3), 5),
    (2, ("image", 1), ("image", 2), 2, ("video", 2), 3),
    (6,),
]


def rows_of(parts=MIXED):
    return [prompt(*row, seed=i) for i, row in enumerate(parts)]


def with_positions(inputs):
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("language", ["qwen2", "llama"])
@torch.no_grad()
def test_forward(language, case, side):
    model = tiny_internvl(seed=1, language=language)
    ours, theirs = split_options(CASES[case])
    rows = rows_of()
    inputs = with_positions(batch(rows, side=side))
    want = oracle(model, inputs, visual(rows, side), **theirs)
    with lp_patch.applied(model, **ours) as patch:
        out = model(**inputs)
        check_sets(patch.trace, want)
        torch.testing.assert_close(out.logits[want.left], want.logits[want.left], **CLOSE)
        assert features_shown(out).shape == (8 * N, HIDDEN)
        for i, row in enumerate(rows):
            alone = model(**batch([row])).logits[0]
            torch.testing.assert_close(out.logits[i][inputs["attention_mask"][i].bool()], alone, **CLOSE)
            assert patch.trace.stage2[0].tolist() == want.stage2[i]


@torch.no_grad()
def test_the_tiles_of_an_image_share_one_budget():
    model = tiny_internvl()
    with lp_patch.applied(model, tokens=4, layer=2) as patch:
        model(**batch([prompt(2, ("image", 4), 3, ("image", 1), 2, ("video", 2), 2)]))
    (r1, r2), (one1, one2) = (budget(n, LAYERS, 2, 3.0, 4) for n in (4 * N, N))
    kept = torch.bincount(patch.trace.stage1[0] // N, minlength=7)
    assert kept[:4].sum() == r1 and kept[4:].tolist() == [one1] * 3
    assert len(patch.trace.stage2[0]) == r2 + 3 * one2


@pytest.mark.parametrize("case", ["tokens", "wipe", "stage 1 alone"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate(beams, case):
    model = tiny_internvl(seed=2)
    ours, theirs = split_options(CASES[case])
    rows = rows_of()
    inputs = batch(rows)
    width = inputs["input_ids"].shape[1]
    search = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": 0.0} if beams > 1 else {}
    with lp_patch.applied(model, **ours) as patch:
        out = generate(model, inputs, output_scores=True, **search)
    grown = [{**rows[i // beams], "ids": rows[i // beams]["ids"] + s[width:].tolist()} for i, s in enumerate(out[0])]
    want = oracle(model, with_positions(batch(grown)), visual(grown), end=width, **theirs)
    check_sets(patch.trace, want)
    steps = want.logits[:, width - 1 : -1]
    if beams == 1:
        torch.testing.assert_close(torch.stack(out.logits, dim=1), steps, **CLOSE)
        return
    # a beam's score is the oracle's log-likelihood of what it says
    likely = steps.log_softmax(-1).gather(2, out.sequences[:, width:, None]).sum(dim=(1, 2))
    torch.testing.assert_close(out.sequences_scores, likely, **CLOSE)


@torch.no_grad()
def test_compact_positions():
    model = tiny_internvl(seed=3)
    rows = rows_of()
    inputs = with_positions(batch(rows))
    with lp_patch.applied(model, tokens=4, layer=2, positions="compact") as patch:
        out = model(**inputs)
    for i, own in enumerate(visual(rows)):
        order = sorted(p for x in own for p in x)
        lost = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.long)
        lost[list(set(order) - {order[j] for j in patch.trace.stage1[i]})] = 1
        inputs["position_ids"][i] -= lost.cumsum(0)
    inputs["position_ids"].clamp_(min=0)
    want = oracle(model, inputs, visual(rows), tokens=4, layer=2)
    check_sets(patch.trace, want)
    torch.testing.assert_close(out.logits[want.left], want.logits[want.left], **CLOSE)


@pytest.mark.parametrize("how", ["full ids", "new ids"])
@pytest.mark.parametrize("second", [(5,), (2, ("image", 2), 4)], ids=["text", "image"])
def test_second_turn_on_a_kept_cache(second, how):
    model = tiny_internvl(seed=5)
    first, second = prompt(3, ("image", 2), 5), prompt(*second, seed=7)
    with lp_patch.applied(model, tokens=4, layer=2) as patch:
        out = generate(model, batch([first]))
        one = patch.trace
        said = out.sequences[0].tolist()
        start = 0 if how == "full ids" else out[CACHE].get_seq_length()
        again = {"input_ids": torch.tensor([(said + second["ids"])[start:]])}
        end = len(said) + len(second["ids"])
        again["attention_mask"] = torch.ones(1, end, dtype=torch.long)
        if second["tiles"]:
            again["pixel_values"] = batch([second])["pixel_values"]
        out = generate(model, again, **{CACHE: out[CACHE]})
        two = patch.trace
    longer = {
        "ids": said + second["ids"] + out.sequences[0, end - start :].tolist(),
        "tiles": first["tiles"] + second["tiles"],
        "visual": first["visual"] + [[p + len(said) for p in x] for x in second["visual"]],
    }
    inputs = batch([longer])
    if second["tiles"]:
        check_second_image(model, inputs, *longer["visual"], (one, two), end, out.logits, tokens=4, k=2)
        return
    want = oracle(model, inputs, visual([longer]), end=len(first["ids"]), tokens=4, layer=2)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), want.logits[:, end - 1 : -1], **CLOSE)


@torch.no_grad()
def test_nothing_to_prune_and_removal_bit_for_bit():
    model = tiny_internvl(dtype=torch.float32)
    inputs, text = batch(rows_of(), torch.float32), batch([prompt(9)])
    before, state = model(**inputs, output_hidden_states=True), dict(vars(model.model))
    silent = model(**text).logits
    said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with lp_patch.applied(model, ratio=1.0):
        full = model(**inputs, output_hidden_states=True)
        assert torch.equal(full.logits, before.logits)
        assert all(map(torch.equal, full.hidden_states, before.hidden_states))
        assert torch.equal(features_shown(full), features_shown(before))
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), said)
    with lp_patch.applied(model, tokens=3, layer=2):
        assert torch.equal(model(**text).logits, silent)
        assert not torch.equal(model(**inputs).logits, before.logits)
    assert vars(model.model).keys() == state.keys()
    assert torch.equal(model(**inputs).logits, before.logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), said)


@torch.no_grad()
@pytest.mark.parametrize("encoded", ["patched", "unpatched"])
def test_features_from_the_caller(encoded):
    model = tiny_internvl(seed=6)
    inputs = batch(rows_of())
    with lp_patch.applied(model, tokens=4, layer=2) as patch:
        want = model(**inputs).logits
        if encoded == "unpatched":
            patch.remove()
        features = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with lp_patch.applied(model, tokens=4, layer=2):
        torch.testing.assert_close(model(**inputs, mm_encoder_outputs={"image": features}).logits, want)


def test_what_does_not_fit_is_refused_at_apply():
    model = tiny_internvl()
    with pytest.raises(lp_patch.ConfigError, match=r"scorer='cls' needs a \[CLS\] token .*, which InternVL"):
        lp_patch.apply(model, scorer="cls")
    with pytest.raises(lp_patch.PrunerError):
        lp_patch.apply(model, pruner=lp_patch.LearnablePruner(HIDDEN + 1, 8))
    assert not lp_patch.is_applied(model)
