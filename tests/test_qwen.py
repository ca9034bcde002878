"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and its mixture of experts, patched, against the masked oracle."""

import sys
from functools import partial

import pytest
import torch
from masked import attention_map, chosen_before, chosen_inside, expected, masked_logits, merged
from oracle import budget
from tiny import CACHE
from tiny_internvl import tiny_internvl
from tiny_qwen import DEEPSTACK, HIDDEN, KINDS, LAYERS, batch, prompt, tiny_qwen, visual

import lp_patch
from lp_patch.registry import find_parts

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
        return
    # a beam's score is the oracle's log-likelihood of what it says
    likely = steps.log_softmax(-1).gather(2, out.sequences[:, width:, None]).sum(dim=(1, 2))
    torch.testing.assert_close(out.sequences_scores, likely, **CLOSE)


def joined(kind, *rows):
    """One row out of several: prompts and answers of a conversation."""
    whole = prompt(kind)
    for row in rows:
        shift = len(whole["ids"])
        whole["visual"] += [[p + shift for p in x] for x in row["visual"]]
        for name in ("ids", "types", "image", "video"):
            whole[name] = whole[name] + row[name]
        whole["grid"] = {name: grid + row["grid"][name] for name, grid in whole["grid"].items()}
    return whole


def said(kind, ids):
    return {**prompt(kind), "ids": ids, "types": [0] * len(ids)}


@pytest.mark.parametrize("how", ["full ids", "new ids"])
@pytest.mark.parametrize("case", ["tokens", "wipe"])
@pytest.mark.parametrize("kind", KINDS)
def test_second_text_turn_on_a_kept_cache(kind, case, how):
    """Positions of the second turn come from rope_deltas and the cache's length, both of the unpruned sequence."""
    model = tiny_qwen(kind, seed=3)
    ours, theirs = split_options(CASES[case])
    first = prompt(kind, 3, ("image", 3, 4), 2, ("video", 2, 2, 3), 5)
    with lp_patch.applied(model, **ours):
        out = generate(model, batch([first]))
        assert out[CACHE].get_seq_length() == out.sequences.shape[1] - 1
        ids = out.sequences[0].tolist() + prompt(kind, 5, seed=7)["ids"]
        start = 0 if how == "full ids" else out[CACHE].get_seq_length()
        again = {"input_ids": torch.tensor([ids[start:]]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        out = generate(model, again, **{CACHE: out[CACHE]})
    new = out.sequences[0, len(ids) - start :].tolist()
    whole = joined(kind, first, said(kind, ids[len(first["ids"]) :] + new))
    want = oracle(model, batch([whole]), visual([whole]), end=len(first["ids"]), **theirs)
    steps = want.logits[:, len(ids) - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), steps, **CLOSE)


def positions_of(model, inputs):
    """(4, B, S): what generate() computes by itself for a first turn."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
    axes, _ = model.model.get_rope_index(ids, inputs["mm_token_type_ids"], attention_mask=mask, **grids)
    return torch.cat([(mask.cumsum(-1) - 1).clamp(min=0)[None], axes])


@torch.no_grad()
def check_second_image(model, inputs, old, new, traces, end, logits, *, tokens, k, language_model=None):
    """Two turns of one row, an image each, against the masked oracle.

    `inputs` hold both turns and what was generated since `end`; `old` and `new` are the images' positions.
    """
    language_model = language_model or model.model.language_model
    layers, length = language_model.layers, inputs["input_ids"].shape[1]

    def gone(positions):
        return torch.zeros(1, length, dtype=torch.bool).index_fill_(1, torch.tensor(positions), True)

    stay1, stay2 = ([old[i] for i in kept[0]] for kept in (traces[0].stage1, traces[0].stage2))
    r1, r2 = budget(len(new), len(layers), k, 3.0, tokens)
    kept1 = [new[i] for i in chosen_before(merged(model, language_model, inputs)[0, new], r1, None, 0.1)]
    hidden = [(0, gone([p for p in old + new if p not in stay1 + kept1])), (k, gone(list(set(stay1) - set(stay2))))]
    maps = attention_map(model, layers, inputs, hidden, k - 1)
    kept2, _ = chosen_inside(maps, 0, kept1, new[-1], torch.ones(1, length, dtype=torch.bool), end, [], r2)
    assert [new[i] for i in traces[1].stage1[0]] == kept1
    assert [new[i] for i in traces[1].stage2[0]] == kept2
    want = masked_logits(model, layers, inputs, [*hidden, (k, gone(list(set(kept1) - set(kept2))))])
    torch.testing.assert_close(torch.stack(logits, dim=1), want[:, end - 1 : -1], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_second_turn_with_a_new_image(kind):
    """transformers itself cannot count a second turn's image (it starts again at 0, or fails): positions are given."""
    model = tiny_qwen(kind, seed=4)
    first, second = prompt(kind, 3, ("image", 3, 4), 5), prompt(kind, 2, ("image", 2, 5), 4, seed=1)
    with lp_patch.applied(model, tokens=4, layer=2) as patch:
        out = generate(model, batch([first]))
        one = patch.trace
        whole = joined(kind, first, said(kind, out.sequences[0, len(first["ids"]) :].tolist()), second)
        again = batch([whole])
        again["position_ids"] = positions_of(model, again)
        again |= {name: batch([second])[name] for name in ("pixel_values", "image_grid_thw")}
        out = generate(model, again, **{CACHE: out[CACHE]})
        traces = one, patch.trace
    end = len(whole["ids"])
    longer = joined(kind, whole, said(kind, out.sequences[0, end:].tolist()))
    check_second_image(model, batch([longer]), *longer["visual"], traces, end, out.logits, tokens=4, k=2)


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_rotated_by_original_positions_and_nothing_sees_their_gaps(kind, given, cached, monkeypatch):
    """A gap in what mask builders and layers are handed would be taken for a packed sequence."""
    model = tiny_qwen(kind, seed=5)
    row = prompt(kind, 3, ("image", 3, 4), 2, ("video", 3, 2, 3), 4)
    inputs = batch([row])
    if kind == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = [0.5]  # time stamps of its video
    true = positions_of(model, inputs)
    del inputs["attention_mask"]
    if given:
        inputs["position_ids"] = true
    shown, rotated = [], []
    module = sys.modules[type(model).__module__]
    build = module.create_causal_mask
    monkeypatch.setattr(
        module, "create_causal_mask", lambda **kwargs: shown.append(kwargs["position_ids"]) or build(**kwargs)
    )

    def note(module, args, kwargs):
        shown.append(kwargs["position_ids"])
        rotated.append(kwargs["position_embeddings"])

    language = model.model.language_model
    with lp_patch.applied(model, tokens=4, layer=2) as patch:
        handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in language.layers]
        model(**inputs, use_cache=cached)
    for handle in handles:
        handle.remove()
    positions = sorted(p for x in row["visual"] for p in x)
    assert len(rotated) == LAYERS and len(shown) == 1 + LAYERS
    for number, found in enumerate(rotated):
        kept = (patch.trace.stage1 if number < 2 else patch.trace.stage2)[0]
        lost = set(positions) - {positions[i] for i in kept}
        stay = [p for p in range(len(row["ids"])) if p not in lost]
        want = language.rotary_emb(torch.zeros(1, 1, 1, dtype=model.dtype), position_ids=true[1:, :, stay])
        assert all(map(torch.equal, found, want))
    for ids in shown:
        assert ids is None or (ids.diff(dim=-1) == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_vl_moe"])
def test_time_stamps_never_ask_not_even_before_a_frame_that_is_gone(kind):
    model = tiny_qwen(kind, seed=6)
    lost = 0
    for seed in range(12):
        row = prompt(kind, 2, ("video", 4, 1, 3), 3, seed=seed)
        inputs = batch([row])
        want = oracle(model, inputs, visual([row]), tokens=2, layer=2)
        with lp_patch.applied(model, tokens=2, layer=2) as patch:
            out = model(**inputs)
        check_sets(patch.trace, want)
        scores = dict(zip(want.stage1[0], patch.trace.stage2_scores[0].tolist(), strict=True))
        assert scores == pytest.approx(want.scores2[0], rel=1e-5)
        torch.testing.assert_close(out.logits[want.left], want.logits[want.left], **CLOSE)
        lost += max(want.stage1[0]) < 9
    assert lost > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_refused(kind):
    model = tiny_qwen(kind)
    row = joined(kind, prompt(kind, 3, ("image", 3, 4), 4), prompt(kind, 5))
    inputs = batch([row])
    inputs["position_ids"] = positions_of(model, inputs)
    inputs["position_ids"][..., -5:] = torch.arange(5)
    del inputs["attention_mask"]
    with lp_patch.applied(model, tokens=4, layer=2) as patch:
        with pytest.raises(lp_patch.UnsupportedInputError, match="packed"):
            model(**inputs, use_cache=False)
        patch.remove()
        want = model(**inputs, use_cache=False).logits
    with lp_patch.applied(model, ratio=1.0):
        assert torch.equal(model(**inputs, use_cache=False).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_prune_and_removal_bit_for_bit(kind):
    model = tiny_qwen(kind, dtype=torch.float32)
    inputs, text = batch(rows_of(kind), torch.float32), batch([prompt(kind, 9)])
    before, state = model(**inputs, output_hidden_states=True), dict(vars(model.model))
    silent = model(**text).logits
    said_before = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with lp_patch.applied(model, ratio=1.0) as patch:
        full = model(**inputs, output_hidden_states=True)
        assert torch.equal(full.logits, before.logits)
        assert all(map(torch.equal, full.hidden_states, before.hidden_states))
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), said_before)
        assert patch.report().flops_ratio == 1.0
    with lp_patch.applied(model, tokens=3, layer=2):
        assert torch.equal(model(**text).logits, silent)
        pruned = model(**inputs, output_hidden_states=True)
        assert not torch.equal(pruned.logits, before.logits)
        assert [x.shape for x in pruned.hidden_states] == [x.shape for x in before.hidden_states]
    assert vars(model.model).keys() == state.keys()
    assert torch.equal(model(**inputs).logits, before.logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), said_before)


@torch.no_grad()
@pytest.mark.parametrize("encoded", ["patched", "unpatched"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_from_the_caller(kind, encoded):
    model = tiny_qwen(kind, seed=7)
    inputs = batch(rows_of(kind))
    with lp_patch.applied(model, tokens=4, layer=2) as patch:
        want, sets = model(**inputs).logits, patch.trace.stage2
        if encoded == "unpatched":
            patch.remove()
        features = {
            "image": model.get_image_features(inputs.pop("pixel_values"), inputs["image_grid_thw"], return_dict=True),
            "video": model.get_video_features(
                inputs.pop("pixel_values_videos"), inputs["video_grid_thw"], return_dict=True
            ),
        }
    with lp_patch.applied(model, tokens=4, layer=2) as patch:
        out = model(**inputs, mm_encoder_outputs=features)
        assert all(map(torch.equal, patch.trace.stage2, sets))
    torch.testing.assert_close(out.logits, want)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_vision_tower(kind):
    model = tiny_qwen(kind, seed=8)
    inputs = batch(rows_of(kind))
    with lp_patch.applied(model, tokens=4, layer=2):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [p.grad for name, p in model.model.visual.named_parameters() if "merger" in name]
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused_at_apply(kind):
    model = tiny_qwen(kind)
    with pytest.raises(lp_patch.ConfigError, match=r"scorer='cls' needs a \[CLS\] token .*, which Qwen"):
        lp_patch.apply(model, scorer="cls")
    with pytest.raises(lp_patch.ConfigError, match='positions="compact" has no meaning for the several axes'):
        lp_patch.apply(model, positions="compact")
    with pytest.raises(lp_patch.PrunerError):
        lp_patch.apply(model, pruner=lp_patch.LearnablePruner(HIDDEN + 1, 8))
    assert not lp_patch.is_applied(model)


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_vl_moe"])
def test_stage_2_waits_for_deepstack(kind):
    model = tiny_qwen(kind)
    with pytest.raises(lp_patch.ConfigError, match=f"layer must be at least {DEEPSTACK}, got {DEEPSTACK - 1}"):
        lp_patch.apply(model, layer=DEEPSTACK - 1)
    lp_patch.apply(model, layer=DEEPSTACK - 1, stage_ratio=1.0)  # then nothing is cut inside
    lp_patch.apply(model, layer=DEEPSTACK)
    short = tiny_qwen(kind, num_hidden_layers=3)  # whose default would be layer 1
    assert f"after layer {DEEPSTACK} of 3" in repr(lp_patch.apply(short))


@torch.no_grad()
def test_report_counts_the_experts_that_run():
    model = tiny_qwen("qwen3_vl_moe", dtype=torch.float32)
    inputs = batch([prompt("qwen3_vl_moe", 3, ("image", 3, 4), 5)], torch.float32)
    with lp_patch.applied(model, tokens=4, layer=2) as patch:
        model(**inputs)
    length, experts = inputs["input_ids"].shape[1], 2 * 3 * HIDDEN * 24  # 2 of 4, each of 3 matrices
    linear, attention = 2 * HIDDEN * 4 * 8 + 2 * HIDDEN * 2 * 8 + experts, 2 * 4 * 8 * length**2
    assert patch.report().layers[0].full_flops == 2 * linear * length + attention


@torch.no_grad()
def test_router_logits_are_refused():
    model = tiny_qwen("qwen3_vl_moe")
    inputs = batch(rows_of("qwen3_vl_moe"))
    with lp_patch.applied(model, tokens=4, layer=2):
        with pytest.raises(lp_patch.UnsupportedInputError, match="output_router_logits"):
            model(**inputs, output_router_logits=True)
        model(**inputs)
    with lp_patch.applied(model, ratio=1.0):
        assert len(model(**inputs, output_router_logits=True).router_logits) == LAYERS


@pytest.mark.parametrize("build", [partial(tiny_qwen, "qwen2_vl"), partial(tiny_qwen, "qwen2_5_vl"), tiny_internvl])
def test_sliding_windows_only_where_they_are_used(build):
    windows = {"sliding_window": 8, "max_window_layers": 2}
    assert find_parts(build(use_sliding_window=False, **windows)).kinds.plain
    kinds = find_parts(build(use_sliding_window=True, **windows)).kinds
    assert kinds.windows == (None, None, 8, 8, 8, 8)
    assert (kinds.scoring(), kinds.reached(8), kinds.reached(9)) == ([1, 2], False, True)
