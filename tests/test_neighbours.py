"""OC-VTP and MetaCompress: the algorithms a second time, in plain loops; merging in a model; the trainers."""

import copy
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pretended_gpu import on_gpu, pretended_gpu
from test_lifecycle import inputs_for, snapshot
from test_strategies import best, vision_maps
from test_towers import pictures, pixtral
from tiny import IMAGE, LAYERS, V5, VOCAB, WIDTH, N, batch, images, pre_encodes, tiny_llava, tokens
from tiny_qwen import tiny_qwen
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import lp_patch
from lp_patch import ConfigError, LearnablePruner, PrunerError, UnsupportedInputError, strategies
from lp_patch.merging import MergingPruner, cells, mixed, sines, standing
from lp_patch.pruner import Pruner
from lp_patch.slots import STEPS, SlotPruner, start_noise
from lp_patch.strategies import Scorer, register
from lp_patch.strategies.oc_vtp import slot_tokens
from lp_patch.training import GatedModel, MergingTraining, SlotTraining, early_tokens, fit, new_slots
from lp_patch.training.merging import largest_column, row_entropy
from lp_patch.training.slots import area_weighted_error

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

ROOT = Path(__file__).resolve().parents[1]
SIDE = math.isqrt(N)


def slots(seed=0, width=WIDTH):
    """A random SlotPruner whose slots differ."""
    torch.manual_seed(seed)
    pruner = SlotPruner(width, 16, 8).double()
    with torch.no_grad():
        for weight in pruner.parameters():
            weight.normal_(0, 0.8)
    return pruner.eval()


def merging(seed=0, width=WIDTH, side=SIDE):
    """A random MergingPruner whose mixtures differ, and are of few tokens."""
    torch.manual_seed(seed)
    pruner = MergingPruner(width, 10, side).double()
    with torch.no_grad():
        pruner.query.weight.normal_(0, 0.6)
        pruner.key.weight.normal_(0, 0.6)
        pruner.factors.normal_(1, 0.5)
    return pruner.eval()


# ---------------------------------------------------------------- OC-VTP


def softmax(values):
    top = max(values)
    powers = [math.exp(x - top) for x in values]
    return [x / sum(powers) for x in powers]


def normed(values, layer):
    mean = sum(values) / len(values)
    spread = sum((x - mean) ** 2 for x in values) / len(values)
    unit = [(x - mean) / math.sqrt(spread + layer.eps) for x in values]
    return [a * b + c for a, b, c in zip(unit, layer.weight.tolist(), layer.bias.tolist(), strict=True)]


def times(weight, x, bias=None):
    bias = [0.0] * len(weight) if bias is None else bias.tolist()
    return [sum(a * b for a, b in zip(row, x, strict=True)) + c for row, c in zip(weight.tolist(), bias, strict=True)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def gru(cell, x, h):
    size = len(h)
    a, b = times(cell.weight_ih, x, cell.bias_ih), times(cell.weight_hh, h, cell.bias_hh)
    out = []
    for i in range(size):
        r, z = sigmoid(a[i] + b[i]), sigmoid(a[size + i] + b[size + i])
        n = math.tanh(a[2 * size + i] + r * b[2 * size + i])
        out.append((1 - z) * n + z * h[i])
    return out


def shares_by_loops(pruner, x, noise):
    """One picture's tokens (N lists) and slots' starts (K lists) -> (K, N) shares."""
    made = []
    for token in x:
        hidden = times(pruner.fc1.weight, normed(token, pruner.norm), pruner.fc1.bias)
        hidden = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in hidden]
        made.append(times(pruner.fc2.weight, hidden, pruner.fc2.bias))
    keys, values = ([times(f.weight, t) for t in made] for f in (pruner.key, pruner.value))
    mean, deviation = pruner.mean.tolist(), pruner.deviation.tolist()
    current = [[m + d * z for m, d, z in zip(mean, deviation, row, strict=True)] for row in noise]
    for _ in range(3):
        asks = [times(pruner.query.weight, normed(slot, pruner.norm_slots)) for slot in current]
        logits = [[sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(8) for q in asks] for k in keys]
        shares = list(zip(*(softmax(row) for row in logits), strict=True))  # over the slots, token by token
        found = []
        for row in shares:
            total = sum(v + 1e-8 for v in row)
            found.append([sum((s + 1e-8) / total * v[i] for s, v in zip(row, values, strict=True)) for i in range(8)])
        current = [gru(pruner.gru, f, slot) for f, slot in zip(found, current, strict=True)]
    return torch.tensor(shares)


def tokens_by_loops(shares):
    """(K, N) lists -> K distinct tokens: each slot's, then the most received."""
    received = [0.0] * len(shares[0])
    chosen = []
    for row in shares:
        chosen.append(max(range(len(row)), key=lambda i: (row[i], -i)))
        for i, v in enumerate(row):
            received[i] += (v + 1e-8) / sum(x + 1e-8 for x in row)
    chosen = set(chosen)
    for i in sorted(range(len(received)), key=lambda i: (-received[i], i)):
        if len(chosen) < len(shares):
            chosen.add(i)
    return sorted(chosen)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_slots_against_loops(seed):
    assert STEPS == 3
    pruner, x = slots(seed), torch.randn(2, 9, WIDTH, dtype=torch.float64)
    noise = torch.randn(4, 8, dtype=torch.float64)
    got, _ = pruner(x, noise)
    for row, own in zip(got, x.tolist(), strict=True):
        torch.testing.assert_close(row, shares_by_loops(pruner, own, noise.tolist()).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.sum(dim=1), torch.ones(2, 9, dtype=torch.float64))


@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 1000), st.data())
def test_slot_tokens_against_loops(n, rows, seed, data):
    keep = data.draw(st.integers(1, n))
    logits = 3 * torch.randn(rows, keep, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shares = logits.softmax(dim=1)
    got = slot_tokens(shares)
    assert got.shape == (rows, keep)
    assert [sorted(row) for row in got.tolist()] == [tokens_by_loops(row) for row in shares.tolist()]


def test_slots_are_the_same_for_every_row_and_every_time():
    pruner, x = slots().float(), torch.randn(5, N, WIDTH)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    together = pruner.compete(x, 7, 1)
    assert torch.get_rng_state().equal(before)
    for row in range(5):
        assert pruner.compete(x[row : row + 1], 7, 1)[0].equal(together[row])
    assert not pruner.compete(x, 7, 2).equal(together)
    # a smaller number of slots starts from the first of them
    assert start_noise(4, 8, 0, x.device).equal(start_noise(9, 8, 0, x.device)[:4])


def test_oc_vtp_reads_what_follows_the_ninth_layer_of_clip():
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=24, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    # the 10th layer, 9 from 0, is given what the 9th makes
    with lp_patch.applied(model, pruner=slots(width=8)) as patch:
        hooked = [i for i, layer in enumerate(layers) if layer.self_attn._forward_pre_hooks]
        assert hooked == [9]
        assert all(layer.self_attn.config is layers[0].self_attn.config for layer in layers)
        assert patch.report().settings["scorer"] == "oc-vtp"
    model.config.vision_feature_layer = 1
    with pytest.raises(ConfigError, match="'oc-vtp' reads tokens between two vision layers, LLaVA uses 1 here"):
        lp_patch.apply(model, pruner=slots(width=8))


@torch.no_grad()
@pytest.mark.parametrize("options", [{"stage_ratio": 1}, {}], ids=str)
def test_oc_vtp_in_a_model(options):
    model, pruner = tiny_llava(seed=7), slots(4)
    prompts = [tokens(3, "image", 6), tokens(2, "image", 4, "image", 3), tokens(5)]
    pixels = images(3)
    tower = model.model.vision_tower
    inner = getattr(tower, "vision_model", tower)
    state = inner(pixels, output_hidden_states=True).hidden_states[1]
    early = inner.encoder.layers[1].layer_norm1(state)[:, 1:]
    assert early_tokens(model, pixels).equal(early)
    with lp_patch.applied(model, tokens=9, pruner=pruner, **options) as patch:
        model(**batch(prompts, pixels))
    trace, keep = patch.trace, 9 if options else 18
    noise = start_noise(keep, 8, 0, early.device).double()
    want = [tokens_by_loops(pruner(x[None], noise)[0][0].tolist()) for x in early]
    assert trace.stage1[0].tolist() == want[0]
    assert trace.stage1[1].tolist() == [*want[1], *(N + i for i in want[2])]
    assert trace.stage1_scores[0] is None
    assert trace.mixtures == [None, None, None]
    assert "mixtures" not in str(patch.report())


@torch.no_grad()
def test_area_weighted_error_against_loops():
    torch.manual_seed(0)
    shares = torch.randn(2, 3, 5, dtype=torch.float64).softmax(dim=1)
    guess, target = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    total = 0.0
    for b in range(2):
        for k in range(3):
            area = sum(float(shares[b, k, n]) for n in range(5))
            for n in range(5):
                error = sum(float(guess[b, n, c] - target[b, n, c]) ** 2 for c in range(4)) / 4
                total += float(shares[b, k, n]) / area * error / 6
    assert float(area_weighted_error(shares, guess, target)) == pytest.approx(total, rel=1e-6)


def test_slot_training_reaches_every_weight_and_learns():
    torch.manual_seed(0)
    training = SlotTraining(new_slots(6))
    assert (training.pruner.intermediate_size, training.pruner.slot_size) == (12, 3)
    x = torch.randn(4, 1, 6).repeat_interleave(9, dim=1) + torch.randn(4, 9, 6)
    noise = torch.randn(5, 3)
    training(x, noise).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in training.parameters())
    first, heard = training(x, noise).item(), []
    fit(
        training,
        lambda step: ((loss := training(x, noise)), {"error": loss.item()}),
        40,
        0.01,
        lambda *x: heard.append(x),
    )
    assert [step for step, _ in heard] == list(range(40))
    assert training(x, noise).item() < 0.9 * first


def test_a_loss_that_is_not_finite_ends_the_training():
    module = torch.nn.Linear(1, 1)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(UnsupportedInputError, match="the loss of step 0 is nan"):
        fit(module, lambda step: (module.weight.sum() * torch.nan, {}), 2)
    assert all(before[name].equal(x) for name, x in module.state_dict().items())


# ---------------------------------------------------------------- MetaCompress


def cells_by_loops(side, count):
    """Bands of rows, each cut into cells of columns: (count, side * side)."""
    bands = math.ceil(math.sqrt(count))
    out = []
    for band in range(bands):
        here = count * (band + 1) // bands - count * band // bands
        rows = [y for y in range(side) if y + 1 > side * band / bands and y < side * (band + 1) / bands]
        for cell in range(here):
            columns = [x for x in range(side) if x + 1 > side * cell / here and x < side * (cell + 1) / here]
            own = {y * side + x for y in rows for x in columns}
            out.append([1 / len(own) if i in own else 0.0 for i in range(side * side)])
    return out


@given(st.integers(1, 9), st.data())
def test_cells_against_loops(side, data):
    count = data.draw(st.integers(1, side * side))
    got = cells(side, count, torch.device("cpu"))
    torch.testing.assert_close(got, torch.tensor(cells_by_loops(side, count)))
    assert bool((got.sum(dim=0) > 0).all())  # every token is in a cell
    if count == side * side:
        assert got.equal(torch.eye(count))


def test_square_cells_are_adaptive_pooling():
    x = torch.randn(1, 3, 7, 7)
    want = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(2)[0].T
    torch.testing.assert_close(cells(7, 16, x.device) @ x.flatten(2)[0].T, want)


def test_sines_tell_places_apart():
    table = sines(5, 24)
    assert table.shape == (25, 24)
    gaps = torch.cdist(table, table) + 9 * torch.eye(25)
    assert gaps.min() > 0.1
    near = gaps.argmin(dim=1)
    assert all(abs(i // 5 - j // 5) + abs(i % 5 - j % 5) == 1 for i, j in enumerate(near.tolist()))
    assert sines(3, 2).shape == (9, 2)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 4, 7, 16])
def test_mixtures_against_loops(count):
    pruner, x = merging(2, width=6, side=4), torch.randn(2, 16, 6, dtype=torch.float64)
    got = pruner.mix(x, count)
    assert got.dtype == torch.float32
    pool, place, b = cells_by_loops(4, count), pruner.places.tolist(), pruner.factors.tolist()
    for row, own in zip(got.tolist(), x.tolist(), strict=True):
        made = []
        for token, e in zip(own, place, strict=True):
            mean = sum(token) / 6
            scale = math.sqrt(sum((v - mean) ** 2 for v in token) / 6 + 1e-5)
            made.append([(v - mean) / scale + p for v, p in zip(token, e, strict=True)])
        keys = [times(pruner.key.weight, t) for t in made]
        for cell, weights in zip(pool, row, strict=True):
            pooled = [sum(w * t[i] for w, t in zip(cell, made, strict=True)) for i in range(6)]
            query = times(pruner.query.weight, pooled)
            logits = [sum(q * f * k for q, f, k in zip(query, b, key, strict=True)) / math.sqrt(10) for key in keys]
            assert weights == pytest.approx(softmax(logits), abs=1e-6)


def test_queries_begin_as_keys():
    pruner = MergingPruner(6, 5, 3)
    assert pruner.query.weight.equal(pruner.key.weight)
    assert pruner.query.weight.data_ptr() != pruner.key.weight.data_ptr()
    assert pruner.factors.tolist() == [1] * 5


def standing_by_loops(weights):
    """(M, N) lists -> (order, places): each at its rounded mean, moved on where that is taken, and back at the end."""
    means = [sum(i * w for i, w in enumerate(row)) for row in weights]
    order = sorted(range(len(means)), key=lambda m: (means[m], m))
    places = []
    for m in order:
        place = round(means[m])
        places.append(max(place, places[-1] + 1) if places else place)
    for back, number in enumerate(reversed(range(len(places)))):
        places[number] = min(places[number], len(weights[0]) - 1 - back)
    return order, places


@given(st.integers(1, 30), st.integers(1, 3), st.integers(0, 1000), st.floats(0.1, 30), st.data())
def test_standing_against_loops(n, rows, seed, sharpness, data):
    count = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    weights = (sharpness * torch.randn(rows, count, n, generator=generator, dtype=torch.float64)).softmax(dim=2)
    order, places = standing(weights)
    for own, by, at in zip(weights.tolist(), order.tolist(), places.tolist(), strict=True):
        assert (by, at) == standing_by_loops(own)
        assert at == sorted(set(at))
        assert at[0] >= 0
        assert at[-1] < n


def test_mixtures_of_one_token_stand_where_it_stood():
    weights = torch.eye(9)[None, [7, 0, 4]]
    order, places = standing(weights)
    assert order.tolist() == [[1, 2, 0]]
    assert places.tolist() == [[0, 4, 7]]
    assert standing(torch.eye(4)[None])[1].tolist() == [[0, 1, 2, 3]]


def test_mixing_is_done_in_float32_or_wider():
    x, weights = torch.randn(2, 50, 4).to(torch.bfloat16), torch.rand(2, 3, 50).softmax(dim=2)
    want = torch.stack([sum(weights[b, :, n, None] * x[b, n].float() for n in range(50)) for b in range(2)])
    with torch.autocast("cpu"):
        got = mixed(x, weights)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.to(torch.bfloat16), rtol=0.01, atol=1e-3)


# ---------------------------------------------------------------- merging in a model

ROWS = [(3, "image", 6), (2, "image", 4, "image", 3), (5, "image", 1), (4, "image"), (7,)]


def merged_alone(model, pruner, ids, pixels, keep, last=LAYERS):
    """Logits (S, vocab) of one prompt whose pictures' tokens were mixed by hand, their positions, and the weights."""
    features = vision_maps(model, pixels)[0]
    x = model.get_input_embeddings()(torch.tensor(ids))
    visual = [i for i, token in enumerate(ids) if token == IMAGE]
    at, given, weights = [i for i, token in enumerate(ids) if token != IMAGE], {}, []
    for number, own in enumerate(features):
        made = pruner(own[None].double(), keep)[0]
        order, places = standing_by_loops(made.tolist())
        mixtures = model.model.multi_modal_projector((made[order] @ own)[None])[0]
        for place, mixture in zip(places, mixtures, strict=True):
            given[visual[number * N + place]] = mixture
        weights.append(made[order])
    at = sorted([*at, *given])
    x = torch.stack([given.get(i, x[i]) for i in at])[None]
    # with a mask: without one a gap in positions is taken for the start of another prompt
    all_real = torch.ones(1, len(at), dtype=torch.long)
    out = model.model.language_model(
        inputs_embeds=x, position_ids=torch.tensor([at]), attention_mask=all_real, use_cache=False
    )
    return model.lm_head(out.last_hidden_state)[0], at, [visual.index(i) for i in at if i in visual], weights


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_every_row_of_a_merged_batch_is_the_oracle_alone(side):
    model, pruner = tiny_llava(seed=7, kv_heads=2), merging()
    prompts = [tokens(*row, seed=i) for i, row in enumerate(ROWS)]
    counts = [row.count("image") for row in ROWS]
    pixels = images(sum(counts))
    inputs = batch(prompts, pixels, side)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with lp_patch.applied(model, tokens=9, stage_ratio=1, pruner=pruner) as patch:
        got = model(**inputs).logits
    trace = patch.trace
    for row, (ids, own) in enumerate(zip(prompts, pixels.split(counts), strict=True)):
        if not counts[row]:
            assert trace.mixtures[row] is None
            continue
        logits, at, places, weights = merged_alone(model, pruner, ids, own, 9)
        assert trace.stage1[row].tolist() == places
        torch.testing.assert_close(got[row][inputs["attention_mask"][row].bool()][at], logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(trace.mixtures[row], torch.block_diag(*weights).float(), rtol=1e-4, atol=1e-5)
        assert trace.stage1_scores[row] is None
    assert "mixtures of them" in repr(trace)
    report = patch.report()
    assert "stage 1 merged: its tokens are mixtures (trace.mixtures), none was kept as it was" in str(report)
    assert report.to_dict()["merged"] == [True, True, True, True, False]


@torch.no_grad()
def test_stage_2_ranks_mixtures():
    model, pruner = tiny_llava(seed=3), merging()
    inputs = inputs_for(model)
    with lp_patch.applied(model, tokens=9, pruner=pruner) as patch:
        model(**inputs)
    trace = patch.trace
    assert (len(trace.stage1[0]), len(trace.stage2[0])) == (18, 6)
    kept = best(trace.stage2_scores[0].tolist(), 6)
    assert trace.stage2[0].tolist() == sorted(trace.stage1[0][i].item() for i in kept)
    assert trace.mixtures[0].shape == (18, N)
    torch.testing.assert_close(trace.mixtures[0].sum(dim=1), torch.ones(18))


@pytest.mark.parametrize(
    "options", [{}, {"stage_ratio": 1}, {"positions": "compact"}, {"final_wipe_layer": 4}], ids=str
)
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_merged_batch_generates_what_its_rows_generate_alone(options, cache):
    model, pruner = tiny_llava(seed=8), merging()
    prompts, pixels = [tokens(3, "image", 5), tokens("image", 2, "image", 2), tokens(6)], images(3)
    given = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    given = {**given, "disable_compile": True} if cache else given
    with lp_patch.applied(model, tokens=9, pruner=pruner, **options):
        together = model.generate(**batch(prompts, pixels), **given)[:, -5:]
        for row, (prompt, own) in enumerate(zip(prompts, pixels.split([1, 2, 0]), strict=True)):
            alone = model.generate(**batch([prompt], own if len(own) else None), **given)[0, -5:]
            assert together[row].tolist() == alone.tolist()
        # and with a cache as without one
        assert model.generate(**batch(prompts, pixels), **{**given, "use_cache": False})[:, -5:].equal(together)


def test_full_budget_and_removal_leave_nothing():
    model, pruner = tiny_llava(dtype=torch.float32), merging()
    inputs = inputs_for(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        before = snapshot(model)
        for given in (pruner, slots()):
            with lp_patch.applied(model, tokens=N, pruner=given) as patch:
                assert model(**inputs).logits.equal(plain)
                assert patch.trace.mixtures == [None]
            with lp_patch.applied(model, tokens=9, pruner=given):
                assert snapshot(model) != before
                assert not model(**inputs).logits.equal(plain)
                twin = copy.deepcopy(model)
            assert snapshot(model) == before
            assert model(**inputs).logits.equal(plain)
            lp_patch.remove(twin)
            assert twin(**inputs).logits.equal(plain)


@pytest.mark.parametrize("make", [slots, merging])
@torch.no_grad()
def test_compiled_prefills_equal_those_that_are_not(make, monkeypatch):
    model, pruner = tiny_llava(seed=3), make()
    shown = [inputs_for(model, seed) for seed in (0, 1)]
    with lp_patch.applied(model, tokens=9, pruner=pruner) as patch:
        want = [(model(**inputs).logits, patch.trace.mixtures[0]) for inputs in shown]
    with (
        pretended_gpu(monkeypatch, model, pruner),
        lp_patch.applied(model, tokens=9, pruner=pruner, compile=True) as patch,
    ):
        for _ in range(2):
            for inputs, (logits, mixtures) in zip(shown, want, strict=True):
                torch.testing.assert_close(model(**on_gpu(inputs)).logits.cpu(), logits)
                found = patch.trace.mixtures[0]
                assert found is mixtures is None or found.equal(mixtures)
        assert patch.captured["regions"] == 2


@pre_encodes
@torch.no_grad()
def test_encoded_features_carry_their_mixtures():
    model, pruner = tiny_llava(), merging()
    inputs = inputs_for(model)
    with lp_patch.applied(model, tokens=9, pruner=pruner) as patch:
        want, mixtures = model(**inputs).logits, patch.trace.mixtures[0]
        features = model.model.get_image_features(pixel_values=inputs.pop("pixel_values"), return_dict=True)
        got = model(**inputs, mm_encoder_outputs={"image": features}).logits
        assert got.equal(want)
        assert patch.trace.mixtures[0].equal(mixtures)


@pre_encodes
@torch.no_grad()
def test_features_from_outside_are_not_mixed_and_it_says_so():
    model, pruner = tiny_llava(), merging()
    inputs = inputs_for(model)
    features = model.model.get_image_features(pixel_values=inputs.pop("pixel_values"), return_dict=True)
    with (
        lp_patch.applied(model, tokens=9, pruner=pruner) as patch,
        pytest.warns(UserWarning, match='scorer="metacompress" reads the vision encoder'),
    ):
        model(**inputs, mm_encoder_outputs={"image": features})
    assert patch.trace.mixtures == [None]


@pytest.fixture
def pairs(monkeypatch):
    """A scorer that makes each token the mean of two neighbours, in any number of tokens."""

    def mix(x):
        n = x.features.shape[1]
        weights = torch.zeros(x.features.shape[0], x.keep, n)
        for i in range(x.keep):
            start = i * (n - 2) // max(1, x.keep - 1)
            weights[:, i, start : start + 2] = 0.5
        return weights

    monkeypatch.setattr(strategies.base, "SCORERS", dict(strategies.SCORERS))
    register(Scorer("pairs", "a test", mix=mix))
    return mix


@torch.no_grad()
def test_pictures_of_several_sizes_in_one_row_are_mixed_apart(pairs):
    """A Pixtral tower gives the projector all pictures in one row."""
    model = pixtral(seed=1)
    # the picture of 15 tokens is within the budget of 16: as it was, beside one that is mixed
    with lp_patch.applied(model, tokens=16, stage_ratio=1, scorer="pairs") as patch:
        together = model(**pictures(model, (1, 2)).inputs).logits
        (own, none) = patch.trace.mixtures
        assert none is None
        assert own.shape == (16 + 15, 36 + 15)
        assert own[:16, :36].gt(0).sum(dim=1).tolist() == [2] * 16
        assert own[16:, 36:].equal(torch.eye(15))
        assert own.count_nonzero() == 2 * 16 + 15
        alone = model(**pictures(model, (1,)).inputs).logits[0]
        torch.testing.assert_close(together[0, -len(alone) :], alone, rtol=1e-4, atol=1e-4)
    # mixing by hand what the projector is given
    (features,) = pictures(model, (1,)).features(model)
    seen = []
    with lp_patch.applied(model, tokens=16, stage_ratio=1, scorer="pairs"):
        hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**pictures(model, (1,)).inputs)
        hook.remove()
    torch.testing.assert_close(seen[-1][0], torch.cat([own[:16, :36].double() @ features[0], features[1]]))


@torch.no_grad()
def test_a_mask_that_hides_a_part_of_a_mixed_picture(pairs):
    model = tiny_llava()
    inputs = inputs_for(model)
    inputs["attention_mask"][0, :10] = 0
    with lp_patch.applied(model, tokens=9, scorer="pairs") as patch:
        assert model(**inputs).logits[0, 10:].isfinite().all()
    assert patch.trace.mixtures == [None]


# ---------------------------------------------------------------- what is refused


def test_wrong_mixtures_are_refused(monkeypatch):
    monkeypatch.setattr(strategies.base, "SCORERS", dict(strategies.SCORERS))
    with pytest.raises(ConfigError, match="'both' brings both select and mix"):
        register(Scorer("both", "a test", select=len, mix=len))
    register(Scorer("wrong", "a test", mix=lambda x: x.features))
    model = tiny_llava()
    with (
        lp_patch.applied(model, tokens=5, scorer="wrong"),
        pytest.raises(ConfigError, match=r"'wrong' answered \(1, 36, 24\), \(1, 9, 36\) was asked for"),
    ):
        model(**inputs_for(model))


def test_pictures_of_another_size_are_refused():
    model = tiny_llava()
    with (
        lp_patch.applied(model, tokens=5, pruner=merging(side=5)),
        pytest.raises(UnsupportedInputError, match="mix the 5 x 5 tokens of a picture, this one has 36"),
    ):
        model(**inputs_for(model))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            slots,
            {"scorer": "learned"},
            "'learned', the pruner is of kind 'oc-vtp' .SlotPruner.: pass scorer=\"oc-vtp\"",
        ),
        (merging, {"scorer": "covering"}, "kind 'metacompress' .MergingPruner.: pass scorer=\"metacompress\""),
        (partial(LearnablePruner, WIDTH), {"scorer": "oc-vtp"}, "reads weights of kind 'oc-vtp', the pruner is of"),
        (merging, {"scorer": "uniform"}, 'scorer="uniform" does not use it'),
        (merging, {"diversity": 0.5}, "diversity=0.5 has no effect with scorer='metacompress'"),
        (slots, {"diversity": 0.5}, "diversity=0.5 has no effect with scorer='oc-vtp'"),
        (lambda: None, {"scorer": "oc-vtp"}, 'scorer="oc-vtp" needs trained weights'),
    ],
)
def test_what_does_not_go_together_is_refused(make, options, message):
    model = tiny_llava()
    with pytest.raises(ConfigError, match=message):
        lp_patch.apply(model, pruner=make(), **options)
    assert not lp_patch.is_applied(model)


@pytest.mark.skipif(not V5, reason="the tiny Qwens are configured for transformers 5")
def test_families_that_cannot_are_refused(pairs):
    with pytest.raises(ConfigError, match=r"'pairs' mixes tokens before a projector .* does not have: use a scorer"):
        lp_patch.apply(tiny_qwen("qwen3_vl"), scorer="pairs")
    with pytest.raises(ConfigError, match=r"scorer='oc-vtp' needs a \[CLS\] token"):
        model = tiny_qwen("qwen2_vl")
        lp_patch.apply(model, pruner=slots(width=model.config.text_config.hidden_size))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("make", [slots, merging])
def test_kinds_of_weights_come_back(tmp_path, make):
    pruner = make().float()
    pruner.training_info = {"seed": 5}
    pruner.save_pretrained(tmp_path)
    again = Pruner.from_pretrained(tmp_path, width=WIDTH)
    assert type(again) is type(pruner) is Pruner.kinds[pruner.kind]
    assert all(x.equal(again.state_dict()[name]) for name, x in pruner.state_dict().items())
    assert {name: getattr(again, name) for name in pruner.sizes} == {
        name: getattr(pruner, name) for name in pruner.sizes
    }
    assert again.training_info == {"seed": 5}
    card = (tmp_path / "README.md").read_text()
    assert f"A `{type(pruner).__name__}` of lp_patch (after" in card
    assert f"{WIDTH}-wide" in card
    model = tiny_llava(dtype=torch.float32)
    with torch.no_grad(), lp_patch.applied(model, tokens=5, pruner=tmp_path) as patch:
        assert patch.report().settings["scorer"] == pruner.kind
        want = model(**inputs_for(model)).logits
        patch.save_pretrained(tmp_path / "settings")
    with torch.no_grad(), lp_patch.applied(model, tmp_path / "settings"):
        assert model(**inputs_for(model)).logits.equal(want)


def test_weights_of_another_kind_are_named(tmp_path):
    slots().save_pretrained(tmp_path)
    with pytest.raises(PrunerError, match="holds weights of kind 'oc-vtp', SlotPruner, asked for was LearnablePruner"):
        LearnablePruner.from_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"oc-vtp"', '"newer"'))
    with pytest.raises(PrunerError, match="is of kind 'newer'; this lp_patch reads learned, "):
        Pruner.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"oc-vtp"', "[]"))
    with pytest.raises(PrunerError, match="is not a pruner's"):
        Pruner.from_pretrained(tmp_path)
    with pytest.raises(PrunerError, match="a gate is a LearnablePruner's, got SlotPruner"):
        GatedModel(tiny_llava().requires_grad_(False), slots())


# ---------------------------------------------------------------- training mixtures


def lesson(model, rows=((2, "image", 5), (3, "image", 4))):
    prompts = [tokens(*row, seed=i) for i, row in enumerate(rows)]
    inputs = batch(prompts, images(len(rows), dtype=next(model.parameters()).dtype), side="right")
    labels = torch.full_like(inputs["input_ids"], -100)
    for i, prompt in enumerate(prompts):
        labels[i, len(prompt) - 2 : len(prompt)] = inputs["input_ids"][i, len(prompt) - 2 : len(prompt)]
    return {**inputs, "labels": labels}


def test_merging_loss_against_its_parts():
    model, pruner = tiny_llava(seed=1).requires_grad_(False), merging()
    training, given = MergingTraining(model, pruner, entropy=0.5, column=2.0).train(), lesson(model)
    out = training(tokens=7, **given)
    torch.testing.assert_close(out.loss.detach(), out.divergence + 0.5 * out.entropy + 2 * out.column)
    # the parts by hand
    with torch.no_grad():
        full = model(**{k: v for k, v in given.items() if k != "labels"}).logits
        student = []
        for row in range(2):
            ids = given["input_ids"][row][given["attention_mask"][row].bool()].tolist()
            logits, at, _, weights = merged_alone(model, pruner, ids, given["pixel_values"][row : row + 1], 7)
            for i in (len(ids) - 3, len(ids) - 2):
                p, q = full[row, i].softmax(-1).tolist(), logits[at.index(i)].softmax(-1).tolist()
                student.append(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
            (own,) = weights
            entropy = sum(-w * math.log(w) for line in own.tolist() for w in line) / 7
            assert float(row_entropy(own[None])) == pytest.approx(entropy)
            assert float(largest_column(own[None])) == pytest.approx(max(map(sum, zip(*own.tolist(), strict=True))))
    assert float(out.divergence) == pytest.approx(sum(student) / 4, rel=1e-3)
    again = training(tokens=7, full=training.full_logits(**given), **given)
    assert again.loss.equal(out.loss)


def test_mixtures_learn_and_the_model_does_not():
    model = tiny_llava(seed=1, dtype=torch.float32).requires_grad_(False)
    with torch.no_grad():
        model.model.get_image_features(images(1, dtype=torch.float32))  # transformers hooks its own modules
    before = snapshot(model)
    torch.manual_seed(0)
    pruner = MergingPruner(WIDTH, 10, SIDE)
    training, given = MergingTraining(model, pruner, entropy=0, column=0).train(), lesson(model)
    assert pruner.training
    assert not model.training
    training(tokens=7, **given).loss.backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in pruner.parameters())
    pruner.zero_grad()
    full = training.full_logits(**given)
    first = training(tokens=7, full=full, **given).divergence
    fit(pruner, lambda step: (training(tokens=7, full=full, **given).loss, {}), 25, 0.02)
    assert training(tokens=7, full=full, **given).divergence < 0.7 * first
    assert snapshot(model) == before
    assert not lp_patch.is_applied(model)


def test_weights_that_are_not_in_training_get_no_gradient():
    model, pruner = tiny_llava().requires_grad_(False), merging()
    with lp_patch.applied(model, tokens=9, pruner=pruner):
        assert not model(**inputs_for(model)).logits.requires_grad
        pruner.train()
        assert model(**inputs_for(model)).logits.requires_grad


def test_what_cannot_be_trained_is_refused():
    model = tiny_llava()
    with pytest.raises(ConfigError, match="the base model would train as well"):
        MergingTraining(model, merging())
    training = MergingTraining(model.requires_grad_(False), merging())
    with pytest.raises(UnsupportedInputError, match="no picture of this batch has more than 36 tokens"):
        training(tokens=N, **lesson(model))


# ---------------------------------------------------------------- docs/neighbours.md


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "neighbours.md").read_text(), re.DOTALL)
)
def test_snippets_of_the_document(code, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = ROOT / "examples" / "testbed" / "model"
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model.name_or_path = model.config._name_or_path = "examples/testbed/model"  # as the weights' own note has it
    processor = AutoProcessor.from_pretrained(folder)
    picture = Image.open(ROOT / "examples" / "testbed" / "demo.png").convert("RGB")
    inputs = processor(images=picture, text="USER: <image>\nWhere is the sign? ASSISTANT:", return_tensors="pt")
    exec(code, {"model": model, "inputs": inputs})
    out = capsys.readouterr().out
    assert "stage 1 merged" in out
    assert not lp_patch.is_applied(model)
