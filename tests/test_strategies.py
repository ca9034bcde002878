"""The catalogue of strategies, by name."""

import copy
import itertools
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import attention_layer, farthest, rotate
from test_lifecycle import inputs_for, snapshot
from test_select import Seen
from tiny import IMAGE, LAYERS, V5, VOCAB, N, batch, images, pre_encodes, tiny_llava, tokens
from tiny_qwen import KINDS, tiny_qwen
from tiny_qwen import batch as qwen_batch
from tiny_qwen import prompt as qwen_prompt
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.qwen2_vl import modeling_qwen2_vl

import lp_patch
from lp_patch import ConfigError, LearnablePruner, UnsupportedInputError, registry, select, strategies
from lp_patch.merging import MergingPruner
from lp_patch.slots import SlotPruner
from lp_patch.strategies import (
    SCORERS,
    TEXT_SCORERS,
    Scorer,
    Stage1Input,
    Stage2Input,
    TextScorer,
    attention_received,
    catalogue,
    register,
    resolve_scorer,
    resolve_text_scorer,
    text_query_weights,
)

settings.register_profile("steady", deadline=None, derandomize=True)  # a loaded machine is no failure
settings.load_profile("steady")


qwen = pytest.mark.skipif(not V5, reason="the tiny Qwens are configured for transformers 5")
# whether rotary embeddings of several axes come as one: (B, N, D)
PER_TOKEN = not hasattr(modeling_qwen2_vl, "apply_multimodal_rotary_pos_emb")


def scores(name, features, keep=4, seed=0, **given):
    return SCORERS[name].score(Stage1Input(features, keep, seed, **given))


def test_catalogue():
    published = {"learned", "diversity", "cls", "visionzip", "vispruner", "hiprune", "oc-vtp", "metacompress"}
    assert set(SCORERS) >= published | {"random", "uniform", "none"}
    assert set(TEXT_SCORERS) >= {"text", "last", "fastv", "iwp"}
    table = catalogue().splitlines()
    assert len(table) == len(SCORERS) + len(TEXT_SCORERS)
    for option, known in (("scorer", SCORERS), ("text_scorer", TEXT_SCORERS)):
        for name, strategy in known.items():
            assert strategy.name == name
            (line,) = [line for line in table if line.startswith(f"{option}={name!r} ")]
            assert line.endswith(f" {strategy.source}")
            # a paper, or a word that it is none
            assert re.search(r"\(\d{4}\.\d{5}\)|baseline|no stage 1|\[CLS\] attention|FastV's|ours", line), line
    assert {name for name in SCORERS if SCORERS[name].needs_pruner} == {"learned", "covering", "oc-vtp", "metacompress"}
    assert {name for name in SCORERS if SCORERS[name].reads} == {"cls", "visionzip", "vispruner", "hiprune", "oc-vtp"}
    assert {name for name in SCORERS if SCORERS[name].mix} == {"metacompress"}


@pytest.fixture
def own_catalogue(monkeypatch):
    """A catalogue of this test's own."""
    monkeypatch.setattr(strategies.base, "SCORERS", dict(SCORERS))
    monkeypatch.setattr(strategies.base, "TEXT_SCORERS", dict(TEXT_SCORERS))


def test_register(own_catalogue):
    mine = Scorer("mine", "a test", lambda x: x.features.norm(dim=2))
    register(mine)
    assert resolve_scorer("mine", None) is mine
    assert "scorer='mine'" in catalogue()
    with pytest.raises(ConfigError, match=r"'mine' is taken\. Taken: auto, cls, covering, "):
        register(mine)
    with pytest.raises(ConfigError, match="'auto' is taken"):
        register(Scorer("auto", "a test"))
    register(TextScorer("mine", "stage 2 has names of its own", text_query_weights))
    assert resolve_text_scorer("mine").source.startswith("stage 2")
    with pytest.raises(ConfigError, match="takes a Scorer or a TextScorer, got function"):
        register(text_query_weights)
    with pytest.raises(ConfigError, match="'both' brings both score and select"):
        register(Scorer("both", "a test", score=lambda x: x, select=lambda x: x))


@given(st.integers(1, 200), st.data())
def test_uniform_is_evenly_spaced(n, data):
    keep = data.draw(st.integers(1, n))
    got = scores("uniform", torch.zeros(2, n, 3), keep)
    assert got.shape == (2, n)
    for row in got.tolist():
        chosen = [i for i, score in enumerate(row) if score > 0]
        assert len(chosen) == keep
        gaps = [b - a for a, b in itertools.pairwise(chosen)]
        assert all(abs(gap - n / keep) < 1 for gap in gaps)
        # centred: what is left over at the two ends is half a gap each, to within a token
        assert abs(chosen[0] - (n - 1 - chosen[-1])) <= 1


def test_random_is_seeded_and_the_same_in_every_batch():
    alone, batch = torch.zeros(1, 50, 3), torch.zeros(4, 50, 3)
    first = scores("random", alone, seed=1)
    assert first.shape == (1, 50)
    assert first.unique().numel() == 50
    assert scores("random", alone, seed=1).equal(first)
    assert not scores("random", alone, seed=2).equal(first)
    assert scores("random", batch, seed=1).equal(first.expand(4, -1))


def test_random_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    scores("random", torch.zeros(1, 50, 3), seed=1)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("name", ["random", "uniform"])
def test_scores_that_look_at_nothing_are_one_operator(name):
    given = Stage1Input(torch.zeros(2, 50, 3), 7, seed=5)
    with Seen() as seen:
        got = SCORERS[name].score(given)
    assert seen.names == [f"lp_patch.{name}_scores.default"]
    traced = make_fx(lambda f: SCORERS[name].score(Stage1Input(f, 7, 5)), tracing_mode="fake")(given.features)
    assert traced(given.features).equal(got)
    got.zero_()  # whoever writes into them spoils no later ones
    assert SCORERS[name].score(given).any()
    operator = getattr(strategies.baselines, f"_{name}_scores")
    torch.library.opcheck(operator, (given.features, 5))


@pytest.mark.parametrize("name", ["random", "uniform"])
def test_scores_that_look_at_nothing_hear_no_default(name, monkeypatch):
    features, want = torch.zeros(2, 50, 3), scores(name, torch.zeros(2, 50, 3), 7)
    strategies.baselines._draw.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            got = scores(name, features, 7)
    finally:
        torch.set_default_dtype(before)
    assert got.equal(want)
    # what stays in store is a tensor like any other
    assert not strategies.baselines._draw(50, 0, torch.device("cpu")).is_inference()


@pytest.mark.parametrize("wide", [torch.float64, torch.float32])
def test_products_are_exact_under_autocast(monkeypatch, wide):
    monkeypatch.setattr(select, "_wide", lambda features: wide)
    torch.manual_seed(0)
    features, attention = 1 + 0.05 * torch.randn(2, 36, 64), (torch.rand(2, 36), torch.rand(2, 36))
    pruners = {x.kind: x for x in (LearnablePruner(64, 16), SlotPruner(64, 16, 8), MergingPruner(64, 8, 6))}
    read = {"oc-vtp": (features,)}
    iwp = stage2_input(torch.randn(20, 4), torch.randn(1, 1, 20, 4), query=torch.randn(1, 1, 1, 4), keep=15)
    calls = {
        name: lambda s=s: (s.select or s.score or s.mix)(
            Stage1Input(features, 20, 0, read.get(s.name, attention[: len(s.reads)]), pruners[s.kind])
        )
        for name, s in SCORERS.items()
        if s.select or s.score or s.mix
    } | {name: lambda s=s: s.score(iwp) for name, s in TEXT_SCORERS.items()}
    assert {"learned", "covering", "vispruner", "oc-vtp", "metacompress", "iwp", "text"} <= calls.keys()
    for name, call in calls.items():
        want = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert call().equal(want), name


def test_learned_asks_the_pruner_and_cls_the_attention():
    torch.manual_seed(0)
    pruner = LearnablePruner(3, 8)
    features = torch.randn(2, 5, 3)
    expected = pruner(features).softmax(-1)[..., 1]
    torch.testing.assert_close(scores("learned", features, pruner=pruner), expected)
    attention = torch.rand(2, 5)
    assert scores("cls", features, attention=(attention,)).equal(attention)


def test_auto():
    pruner = LearnablePruner(3, 8)
    assert resolve_scorer("auto", None) is SCORERS["diversity"]
    assert resolve_scorer("auto", pruner) is SCORERS["learned"]
    assert resolve_scorer("learned", pruner) is SCORERS["learned"]
    assert resolve_scorer("auto", SlotPruner(3, 4, 2)) is SCORERS["oc-vtp"]
    assert resolve_scorer("auto", MergingPruner(3, 4, 2)) is SCORERS["metacompress"]
    for name in ("diversity", "cls", "random", "uniform"):
        assert resolve_scorer(name, None) is SCORERS[name]


def test_learned_needs_a_pruner():
    with pytest.raises(ConfigError, match='scorer="learned" needs trained weights: pass pruner='):
        resolve_scorer("learned", None)


@pytest.mark.parametrize("name", ["diversity", "cls", "random", "uniform"])
def test_a_pruner_that_would_be_ignored_is_refused(name):
    with pytest.raises(ConfigError, match=f'pruner was given but scorer="{name}" does not use it'):
        resolve_scorer(name, LearnablePruner(3, 8))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("", "."),
        ("xyz", "."),
        ("Learned", "; did you mean 'learned'?"),
        ("learnt", "; did you mean 'learned'?"),
        ("CLS", "; did you mean 'cls'?"),
        ("AUTO", "; did you mean 'auto'?"),
        ("divprune", "; did you mean 'diversity'?"),
        ("LearnPruner", "; did you mean 'learned'?"),
        ("fastv", ': it is a text_scorer, pass scorer="none", text_scorer="fastv".'),
        ("FastV", ': it is a text_scorer, pass scorer="none", text_scorer="fastv".'),
        ("text", ': it is a text_scorer, pass text_scorer="text".'),
    ],
)
def test_unknown_scorer(name, hint):
    message = f"unknown scorer {name!r}{hint} Allowed: auto, {', '.join(sorted(SCORERS))}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        resolve_scorer(name, None)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("", "."),
        ("auto", "."),
        ("Text", "; did you mean 'text'?"),
        ("fast-v", "; did you mean 'fastv'?"),
        ("diversity", ': it is a scorer, pass scorer="diversity".'),
        ("CLS", ': it is a scorer, pass scorer="cls".'),
    ],
)
def test_unknown_text_scorer(name, hint):
    message = f"unknown text_scorer {name!r}{hint} Allowed: {', '.join(sorted(TEXT_SCORERS))}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        resolve_text_scorer(name)
    assert resolve_text_scorer("text").weigh is text_query_weights


def query_weights(row):
    """One row of "t"ext, "v"isual and "." padding."""
    last_visual = max((i for i, kind in enumerate(row) if kind == "v"), default=-1)
    queries = [i for i, kind in enumerate(row) if kind == "t" and i > last_visual]
    if not queries:
        queries = [i for i, kind in enumerate(row) if kind != "."][-1:]
    return [1 / len(queries) if i in queries else 0.0 for i in range(len(row))]


def weights(rows):
    kinds = [list(row) for row in rows]
    return text_query_weights(
        torch.tensor([[kind == "t" for kind in row] for row in kinds]),
        torch.tensor([[kind == "v" for kind in row] for row in kinds]),
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("ttvvtt", [0, 0, 0, 0, 0.5, 0.5]),
        ("tvtvvt", [0, 0, 0, 0, 0, 1]),  # only text after the last image has seen them all
        ("ttvv", [0, 0, 0, 1]),  # nothing asks: the last real token does
        ("vv..", [0, 1, 0, 0]),
        ("tttt", [0.25] * 4),
        ("..vt", [0, 0, 0, 1]),
        ("vtt.", [0, 0.5, 0.5, 0]),
        ("....", [0, 0, 0, 0]),
    ],
)
def test_text_query_weights_by_hand(row, expected):
    assert weights([row]).tolist() == [expected]


@given(st.integers(1, 12).flatmap(lambda n: st.lists(st.text("tv.", min_size=n, max_size=n), min_size=1, max_size=4)))
def test_text_query_weights(rows):
    got = weights(rows)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor([query_weights(row) for row in rows]))


# ---------------------------------------------------------------- the published selections, written a second time


def best(values, count):
    """Indices of the `count` largest, ties to the first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def vispruner(features, attention, keep):
    """One input (N, C), from its paper and the order in which its authors deal."""
    order = best(attention, len(attention))
    important, others = order[: keep // 2], order[keep // 2 :]
    while len(others) > keep - keep // 2:
        even = [i for place, i in enumerate(others) if place % 2 == 0]
        odd = [i for place, i in enumerate(others) if place % 2 == 1]
        alike = {i: max(cosine(features[i], features[j]) for j in odd) for i in even}
        ranked = sorted(even, key=lambda i: -alike[i])
        gone = min(8, len(others) - (keep - keep // 2), len(even))
        others = ranked[gone:] + odd
    return sorted(important + others)


def hiprune(middle, last, keep):
    """One input on a square grid."""
    side = round(len(middle) ** 0.5)
    chosen = set()
    for anchor in best(middle, round(0.1 * keep / 5)):
        row, column = divmod(anchor, side)
        for r, c in [(row, column), (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]:
            if 0 <= r < side and 0 <= c < side:
                chosen.add(r * side + c)
    rest = [i for i in best(last, len(last)) if i not in chosen]
    return sorted([*chosen, *rest[: keep - len(chosen)]])


def chosen_by(name, features, keep, *attention):
    got = SCORERS[name].select(Stage1Input(features, keep, 0, attention))
    assert got.shape == (len(features), keep)
    assert all(len(set(row)) == keep for row in got.tolist())
    return [sorted(row) for row in got.tolist()]


@given(st.integers(2, 60), st.integers(1, 3), st.integers(0, 99), st.data())
def test_vispruner_against_loops(n, rows, seed, data):
    keep = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, n, 4, generator=generator).double()
    attention = torch.rand(rows, n, generator=generator)
    got = chosen_by("vispruner", features, keep, attention)
    assert got == [vispruner(f, a, keep) for f, a in zip(features.tolist(), attention.tolist(), strict=True)]


def test_vispruner_keeps_one_of_two_twins():
    features = torch.eye(8)[None].repeat(1, 1, 1)
    features[0, 5] = features[0, 4]
    attention = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]])
    (kept,) = chosen_by("vispruner", features, 7, attention)
    assert len({4, 5} & set(kept)) == 1


@given(st.integers(1, 14), st.integers(1, 3), st.integers(0, 99), st.data())
def test_hiprune_against_loops(side, rows, seed, data):
    keep = data.draw(st.integers(1, side**2))
    generator = torch.Generator().manual_seed(seed)
    middle, last = torch.rand(2, rows, side**2, generator=generator)
    got = chosen_by("hiprune", torch.zeros(rows, side**2, 2), keep, middle, last)
    assert got == [hiprune(m, x, keep) for m, x in zip(middle.tolist(), last.tolist(), strict=True)]


def test_hiprune_surrounds_without_wrapping():
    middle, last = torch.zeros(1, 100), torch.linspace(0, 0.1, 100)[None]
    middle[0, 39] = 1.0  # the end of the fourth row of ten
    (kept,) = chosen_by("hiprune", torch.zeros(1, 100, 2), 50, middle, last)
    assert {39, 38, 29, 49} <= set(kept)
    assert 40 not in kept
    assert kept[-46:] == list(range(54, 100))


def test_hiprune_needs_a_grid():
    with pytest.raises(UnsupportedInputError, match="square grid of patches, got 12 tokens"):
        chosen_by("hiprune", torch.zeros(1, 12, 2), 5, torch.rand(1, 12), torch.rand(1, 12))


def test_visionzip_is_the_top_of_cls():
    attention = torch.rand(3, 20)
    assert chosen_by("visionzip", torch.zeros(3, 20, 2), 6, attention) == [
        sorted(best(row, 6)) for row in attention.tolist()
    ]


# ---------------------------------------------------------------- in a model, against everything written a second time


@torch.no_grad()
def vision_maps(model, pixels):
    """(n, N, C) features, and (layers up to theirs, n, 1 + N, 1 + N) attention, mean over heads, by its weights."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    states = tower(pixels, output_hidden_states=True).hidden_states
    maps = []
    for layer, x in zip(tower.encoder.layers[:-1], states, strict=False):
        y, heads = layer.layer_norm1(x), tower.config.num_attention_heads
        q, k = (
            f(y).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        maps.append((q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1).mean(1))
    return states[-2][:, 1:], torch.stack(maps)


def kept_before(model, pixels, scorer, keep):
    """Indices that stage 1 keeps, image after image."""
    features, maps = vision_maps(model, pixels)
    n = features.shape[1]
    out = []
    for image in range(len(pixels)):
        cls = maps[-1, image, 0, 1:].tolist()
        middle, last = (maps[layer, image].sum(0)[1:].tolist() for layer in (0, -1))
        kept = {
            "none": lambda: list(range(n)),
            "diversity": lambda image=image: sorted(farthest(features[image], [], keep)),
            "visionzip": lambda cls=cls: sorted(best(cls, keep)),
            "vispruner": lambda image=image, cls=cls: vispruner(features[image].tolist(), cls, keep),
            "hiprune": lambda middle=middle, last=last: hiprune(middle, last, keep),
        }[scorer]()
        out += [image * n + i for i in kept]
    return out


def text_after(last_visual, end):
    return list(range(last_visual + 1, end)) or [end - 1]


def received_from(queries):
    """A stage-2 score: attention of `queries` (last visual token, length) -> positions."""

    def score(model, layer, x, at, visual, attention, wanted):
        asking = queries(max(visual), at[-1] + 1)
        mean = attention.mean(0)[[at.index(i) for i in asking]].mean(0)
        return [float(mean[at.index(i)]) for i in visual if i in at]

    return score


@torch.no_grad()
def whole(model, ids, pixels, kept, k, wanted, score):
    """Logits (S, vocab) at the tokens that are left, their positions, what stage 2 kept and its scores."""
    visual = [i for i, token in enumerate(ids) if token == IMAGE]
    x = model.get_input_embeddings()(torch.tensor(ids))
    projected = model.model.multi_modal_projector(vision_maps(model, pixels)[0]).flatten(0, 1)
    for number, position in enumerate(visual):
        x[position] = projected[number]
    at = [i for i in range(len(ids)) if i not in visual or visual.index(i) in kept]
    x = x[at]
    for number, layer in enumerate(model.model.language_model.layers, start=1):
        before = x
        x, attention = attention_layer(model, layer, x, at)
        if number == k and wanted < len(kept):
            scores = score(model, layer, before, at, visual, attention, wanted)
            left = [visual[kept[i]] for i in best([-1.0 if s is None else s for s in scores], wanted)]
            stay = [s for s, i in enumerate(at) if i not in visual or i in left]
            at, x = [at[s] for s in stay], x[stay]
    logits = model.lm_head(model.model.language_model.norm(x))
    return logits, at, [visual.index(i) for i in at if i in visual], scores if wanted < len(kept) else None


def chosen_by_iwp(model, layer, x, at, visual, attention, wanted):
    """Magnitude and duplication by plain sums; of tokens that are not chosen, None."""
    c = model.config.text_config
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    y, a = layer.input_layernorm(x), layer.self_attn
    q, k, v = (
        f(y).view(len(y), count, -1).transpose(0, 1)
        for f, count in ((a.q_proj, heads), (a.k_proj, kv_heads), (a.v_proj, kv_heads))
    )
    theta = c.rope_parameters["rope_theta"] if hasattr(c, "rope_parameters") else c.rope_theta
    turned, dim = rotate(k, at, theta), q.shape[-1]
    candidates = [at.index(i) for i in visual if i in at]
    asking = [at.index(i) for i in text_after(max(visual), at[-1] + 1)]
    size = {}
    for i in candidates:
        parts = []
        for head in range(heads):
            own = head * kv_heads // heads
            mean = sum(q[head, j] for j in asking) / len(asking)
            parts.append(math.exp(float(mean @ k[own, i]) / math.sqrt(dim)) * float(v[own, i].norm()))
        size[i] = sum(parts) / heads
    low, high = min(size.values()), max(size.values())
    left, chosen, chunk = {i: (s - low) / (high - low) for i, s in size.items()}, {}, 2
    while len(chosen) < wanted:
        ranked = sorted(left, key=lambda i: (-left[i], i))[: min(chunk, wanted - len(chosen))]
        picks = {i: left.pop(i) for i in ranked}
        for i in left:
            most = 0.0
            for j in picks:
                alike = 0.0
                for h in range(kv_heads):
                    distance = float(((turned[h, i] - turned[h, j]) ** 2).sum())
                    alike += cosine(v[h, i].tolist(), v[h, j].tolist()) * math.exp(-distance / (2 * math.sqrt(dim)))
                most = max(most, (alike / kv_heads) ** 2)
            left[i] *= max(0.01, 1 - 5 * most)
        chosen |= picks
        chunk *= 2
    return [chosen.get(i) for i in candidates]


TEXT = received_from(text_after)
LAST = received_from(lambda last_visual, end: [end - 1])
# options, (tokens kept by stage 1, by stage 2, layers before it), the score of stage 2
WHOLE = {
    "visionzip": ({"scorer": "visionzip", "tokens": 9}, (18, 6, 2), TEXT),
    "vispruner": ({"scorer": "vispruner", "tokens": 9}, (18, 6, 2), TEXT),
    "vispruner, stage 1 alone": ({"scorer": "vispruner", "tokens": 7, "stage_ratio": 1.0}, (7, 7, 2), TEXT),
    "hiprune": ({"scorer": "hiprune", "tokens": 15}, (27, 9, 2), TEXT),
    "hiprune, stage 1 alone": ({"scorer": "hiprune", "tokens": 30, "stage_ratio": 1}, (30, 30, 2), TEXT),
    "last": ({"text_scorer": "last", "tokens": 9}, (18, 6, 2), LAST),
    "last, after 4": ({"text_scorer": "last", "scorer": "vispruner", "tokens": 9, "layer": 4}, (12, 4, 4), LAST),
    "none": ({"scorer": "none", "tokens": 20, "layer": 1}, (36, 17, 1), TEXT),
    "fastv": ({"scorer": "none", "text_scorer": "fastv", "tokens": 16}, (36, 6, 2), LAST),
    "iwp": ({"text_scorer": "iwp", "tokens": 12}, (15, 5, 5), chosen_by_iwp),
    "iwp alone": ({"scorer": "none", "text_scorer": "iwp", "tokens": 24, "layer": 2}, (36, 18, 2), chosen_by_iwp),
    "fastv by ratio": ({"scorer": "none", "text_scorer": "fastv", "ratio": 0.5}, (36, 9, 2), LAST),
}
ROWS = [(3, "image", 6), (2, "image", 4, "image", 3), (5, "image", 1), (4, "image"), (7,)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE.keys())
def test_every_row_of_a_batch_is_the_oracle_alone(case, side):
    options, (r1, r2, k), score = case
    model = tiny_llava(seed=7, kv_heads=2)
    prompts = [tokens(*row, seed=i) for i, row in enumerate(ROWS)]
    counts = [row.count("image") for row in ROWS]
    pixels = images(sum(counts))
    inputs = batch(prompts, pixels, side)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with lp_patch.applied(model, **options) as patch, torch.no_grad():
        got = model(**inputs).logits
    trace = patch.trace
    for row, (ids, own) in enumerate(zip(prompts, pixels.split(counts), strict=True)):
        if not counts[row]:
            assert trace.tokens_per_layer[row] == [0] * LAYERS
            continue
        kept = kept_before(model, own, options.get("scorer", "diversity"), r1)
        logits, at, stage2, scores = whole(model, ids, own, kept, k, r2 * counts[row], score)
        assert trace.stage1[row].tolist() == kept
        assert trace.stage2[row].tolist() == stage2
        torch.testing.assert_close(got[row][inputs["attention_mask"][row].bool()][at], logits, rtol=1e-4, atol=3e-5)
        assert trace.tokens_per_layer[row] == [len(kept)] * k + [len(stage2)] * (LAYERS - k)
        assert trace.stage1_scores[row] is None
        if scores is None:
            assert trace.stage2_scores[row] is None
        else:
            got_scores = trace.stage2_scores[row].tolist()
            known = [(a, b) for a, b in zip(got_scores, scores, strict=True) if b is not None]
            assert len(known) >= len(stage2)
            torch.testing.assert_close([a for a, _ in known], [b for _, b in known], rtol=1e-4, atol=1e-6)
    # the average over the layers is the budget, to less than a token for each of an image's later layers
    average = options.get("tokens") or options["ratio"] * N
    assert average <= sum(trace.tokens_per_layer[0]) / LAYERS < average + r1 / r2 + 1
    assert f"{sum(map(len, trace.stage2))}" in str(patch.report())


@pytest.mark.parametrize("options", [case[0] for case in WHOLE.values()], ids=WHOLE.keys())
def test_a_batch_generates_what_its_rows_generate_alone(options):
    model = tiny_llava(seed=8)
    prompts, pixels = [tokens(3, "image", 5), tokens("image", 2)], images(2)
    with lp_patch.applied(model, **options):
        together = model.generate(**batch(prompts, pixels), max_new_tokens=5, do_sample=False)[:, -5:]
        for row, (prompt, own) in enumerate(zip(prompts, pixels.split(1), strict=True)):
            alone = model.generate(**batch([prompt], own), max_new_tokens=5, do_sample=False)[0, -5:]
            assert together[row].tolist() == alone.tolist()


@pytest.mark.parametrize("options", [case[0] for case in WHOLE.values()], ids=WHOLE.keys())
def test_removal_leaves_nothing(options):
    model = tiny_llava(dtype=torch.float32)
    inputs = inputs_for(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        before = snapshot(model)
        with lp_patch.applied(model, **options):
            assert snapshot(model) != before
            model(**inputs)
            twin = copy.deepcopy(model)
        assert snapshot(model) == before
        assert torch.equal(model(**inputs).logits, plain)
        lp_patch.remove(twin)
        assert torch.equal(twin(**inputs).logits, plain)


@pytest.mark.parametrize("options", [case[0] for case in WHOLE.values()], ids=WHOLE.keys())
def test_full_budget_is_untouched(options):
    model = tiny_llava(dtype=torch.float32)
    inputs = inputs_for(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        with lp_patch.applied(model, **{**options, "tokens": N, "ratio": None}) as patch:
            assert torch.equal(model(**inputs).logits, plain)
    assert patch.trace.tokens_per_layer == [[N] * LAYERS]


def test_hiprune_reads_the_ninth_layer_of_clip():
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=24, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    for feature_layer, expected in [(-2, [8, 22]), (-1, [8, 23]), (12, [4, 11]), (1, [0])]:
        model.config.vision_feature_layer = feature_layer
        with lp_patch.applied(model, scorer="hiprune") as patch:
            tapped = [i for i, layer in enumerate(layers) if type(layer.self_attn.config) is not CLIPVisionConfig]
            assert tapped == expected
            assert sum(len(readings) for _, readings in patch._settings.readings) == 2


def test_two_readings_of_one_layer():
    """A tower of which one layer is used: both of HiPrune's readings are that one's."""
    model = tiny_llava()
    model.config.vision_feature_layer = 1
    with lp_patch.applied(model, scorer="hiprune", tokens=30, stage_ratio=1) as patch, torch.no_grad():
        model(**inputs_for(model))
    assert patch.trace.tokens_per_layer == [[30] * LAYERS]


REFUSED = [
    (
        {"scorer": "none"},
        "none.* runs 2 of 6 decoder layers on all .* so 0.2222 of .* a ratio above 0.3333, or a smaller",
    ),
    ({"scorer": "none", "tokens": 20, "stage_ratio": 2.0}, "stage_ratio=2.0 has no meaning with scorer='none'"),
    ({"scorer": "none", "tokens": 20, "stage_ratio": 1}, "stage_ratio=1 has no meaning with scorer='none'"),
    ({"scorer": "none", "tokens": 20, "diversity": 0.5}, "diversity=0.5 has no effect with scorer='none'"),
    (
        {"scorer": "vispruner", "diversity": 1.0},
        "diversity=1.0 has no effect with scorer='vispruner', which has a rule",
    ),
    ({"text_scorer": "fastv"}, "'fastv' is a method without stage 1, got scorer='diversity': pass scorer=\"none\""),
    ({"text_scorer": "last", "stage_ratio": 1}, "stage_ratio=1 switches stage 2 off, so text_scorer='last' has no"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_what_cannot_act_is_refused(options, message):
    model = tiny_llava()
    with pytest.raises(ConfigError, match=message):
        lp_patch.apply(model, **options)
    assert not lp_patch.is_applied(model)


def test_a_budget_that_the_first_layers_use_up_is_refused_and_the_next_prompt_runs(monkeypatch):
    model = tiny_llava()
    told = registry.find_parts(model).adapter
    monkeypatch.setitem(registry._adapters, "llava", replace(told, fewest=None))  # as where pictures differ in size
    with lp_patch.applied(model, scorer="none", text_scorer="fastv", tokens=12) as patch, torch.no_grad():
        with pytest.raises(ConfigError, match=r"a ratio above 0\.3333 \(tokens=13 for an input of 36\), or a smaller"):
            model(**inputs_for(model))
        model(**batch([tokens(4)], None))
        assert patch.trace.visual_tokens == [0]
    with lp_patch.applied(model, scorer="none", text_scorer="fastv", tokens=13) as patch, torch.no_grad():
        model(**inputs_for(model))
    assert patch.trace.tokens_per_layer == [[36, 36, 2, 2, 2, 2]]


def test_no_share_for_diversity_may_be_said():
    with lp_patch.applied(tiny_llava(), scorer="vispruner", diversity=0.0) as patch:
        assert patch.config.diversity == 0


@qwen
@pytest.mark.parametrize("name", ["cls", "visionzip", "vispruner", "hiprune"])
def test_families_without_cls_are_refused(name):
    for kind in ("qwen2_vl", "qwen3_vl"):
        with pytest.raises(
            ConfigError, match=rf"scorer='{name}' needs a \[CLS\] .* \"diversity\", \"none\", \"random\""
        ):
            lp_patch.apply(tiny_qwen(kind), scorer=name)


@pytest.mark.parametrize("name", ["cls", "visionzip", "vispruner", "hiprune"])
def test_towers_whose_cls_is_not_cut_off_are_refused(name):
    model = tiny_llava()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ConfigError, match=r"a scorer that reads \[CLS\] needs a tower whose \[CLS\] .*='full'"):
        lp_patch.apply(model, scorer=name)


@pre_encodes
@pytest.mark.parametrize("name", ["visionzip", "hiprune"])
def test_features_from_outside_fall_back_and_say_so(name):
    model = tiny_llava()
    inputs = inputs_for(model)
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=inputs.pop("pixel_values"), return_dict=True)
        with (
            lp_patch.applied(model, scorer=name, tokens=5) as patch,
            pytest.warns(UserWarning, match=f'scorer="{name}" reads the vision encoder'),
        ):
            model(**inputs, mm_encoder_outputs={"image": features})
    assert len(patch.trace.stage1[0]) == 9


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            Scorer("wrong", "a test", score=lambda x: x.features.norm(dim=2)[:, 1:]),
            r"'wrong' answered \(1, 35\), \(1, 36\)",
        ),
        (Scorer("wrong", "a test", select=lambda x: x.features.norm(dim=2)), r"'wrong' answered \(1, 36\), \(1, 9\)"),
        (
            TextScorer("wrong", "a test", text_query_weights, lambda x: x.weights),
            r"'wrong' answered \(1, 9\), \(1, 21\)",
        ),
    ],
)
def test_a_wrong_answer_is_refused(own_catalogue, strategy, message):
    register(strategy)
    model = tiny_llava()
    option = {"scorer" if isinstance(strategy, Scorer) else "text_scorer": "wrong"}
    with lp_patch.applied(model, tokens=5, **option), pytest.raises(ConfigError, match=message):
        model(**inputs_for(model))


@pytest.mark.parametrize(
    ("row", "kept", "expected"),
    [
        ("tvvt", "++++", 3),
        ("tvvt.", "++++-", 3),
        ("ttvv", "++++", 3),
        ("ttvv", "+++-", 2),
        ("..vt", "++++", 3),
        ("....", "++++", None),
    ],
)
def test_last_query_weights(row, kept, expected):
    rows = torch.tensor([[kind == x for kind in row] for x in "tv"])
    got = TEXT_SCORERS["last"].weigh(rows[:1], rows[1:], torch.tensor([[x == "+" for x in kept]]))
    assert got.dtype == torch.float32
    assert got.tolist() == [[float(i == expected) for i in range(len(row))]]


# ---------------------------------------------------------------- IWP's parts


def stage2_input(value, key=None, **given):
    """Tokens of one row with one head, no rotation; all are visual but the last, which asks."""
    value = torch.as_tensor(value)[None, None]
    n = value.shape[2]
    return Stage2Input(
        **{
            "query": torch.zeros(1, 1, 1, value.shape[3]),
            "key": torch.eye(n, value.shape[3])[None, None] if key is None else key,
            "value": value,
            "key_mask": None,
            "weights": torch.ones(1, 1),
            "scaling": value.shape[3] ** -0.5,
            "visual": torch.arange(n)[None] < n - 1,
            "keep": 3,
            "rotary": (torch.ones(1, n, value.shape[3]), torch.zeros(1, n, value.shape[3])),
            **given,
        }
    )


def test_iwp_by_hand():
    # the third says what the first does; its magnitude is the third largest, after which comes the fourth's
    value = [[4.0, 0, 0, 0], [0, 3, 0, 0], [2, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0.5], [9, 9, 9, 9]]
    key = torch.zeros(1, 1, 6, 4)
    got = TEXT_SCORERS["iwp"].score(stage2_input(value, key))[0].tolist()
    # from 0.5 to 4 means from 0 to 1
    torch.testing.assert_close(got, [1.0, 2.5 / 3.5, 0.01 * 1.5 / 3.5, 0.5 / 3.5, 0.0, -1.0])
    # keys tell them apart: the third's distance to the first is 2, and exp(-4 / (2 * 2)) its duplication
    key[0, 0, 2, 0] = 2.0
    got = TEXT_SCORERS["iwp"].score(stage2_input(value, key))[0].tolist()
    alike = math.exp(-1) ** 2
    torch.testing.assert_close(got[2], (1 - 5 * alike) * 1.5 / 3.5)


def test_iwp_of_large_and_of_equal_tokens():
    value = torch.ones(5, 4) * torch.tensor([1.0, 2, 3, 4, 5])[:, None]
    query, key = torch.full((1, 1, 1, 4), 100.0), torch.full((1, 1, 5, 4), 100.0)
    large = TEXT_SCORERS["iwp"].score(stage2_input(value, key, query=query, keep=2))
    assert large.isfinite().all() and large[0, 3] == 1
    equal = TEXT_SCORERS["iwp"].score(stage2_input(torch.ones(5, 4), key))
    assert equal[0].tolist() == [0.0] * 4 + [-1.0]


@pytest.mark.parametrize("elements", [1, 100, 700])
def test_iwp_in_blocks(monkeypatch, elements):
    torch.manual_seed(0)
    given = stage2_input(torch.randn(20, 4), torch.randn(1, 1, 20, 4), keep=15)
    want = TEXT_SCORERS["iwp"].score(given)
    sizes, real = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b: sizes.append(a.shape[1] * b.shape[1]) or real(a, b))
    monkeypatch.setattr(strategies.iwp, "_CHUNK_ELEMENTS", elements)
    torch.testing.assert_close(TEXT_SCORERS["iwp"].score(given), want)
    assert max(sizes) <= max(elements, 20)


@torch.no_grad()
def test_iwp_reads_what_every_back_end_reads():
    model = tiny_llava(seed=9, kv_heads=2, dtype=torch.float32)
    inputs = batch([tokens(3, "image", 6), tokens("image", 2), tokens(4)], images(2, dtype=torch.float32))
    with lp_patch.applied(model, text_scorer="iwp", tokens=12) as patch:
        model(**inputs)
        want = [x.tolist() for x in patch.trace.stage2]
        model.set_attn_implementation("eager")
        assert model(**inputs).logits[inputs["attention_mask"].bool()].isfinite().all()
    assert [x.tolist() for x in patch.trace.stage2] == want
    assert [len(x) for x in want] == [5, 5, 0]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llava", "llava, compact", *(pytest.param(kind, marks=qwen) for kind in KINDS)])
def test_unrotated_keys_are_what_was_projected(own_catalogue, kind):
    seen, projected = [], {}

    def note(x):
        seen.append({"k": x.unrotated(x.key[:, :, -x.visual.shape[1] :]), "q": x.unrotated(x.query)})
        return attention_received(x)

    register(TextScorer("noting", "a test", text_query_weights, note))
    if kind in KINDS:
        model = tiny_qwen(kind, dtype=torch.float32)
        inputs = qwen_batch([qwen_prompt(kind, 3, ("image", 3, 4), 5), qwen_prompt(kind, 2, ("image", 2, 2), 1)])
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    else:
        model = tiny_llava(kv_heads=2, dtype=torch.float32)
        inputs = batch([tokens(3, "image", 5), tokens(9, "image", 1)], images(2, dtype=torch.float32))
    decoder = model.model.language_model
    attention = decoder.layers[1].self_attn
    for name in "kq":
        module = getattr(attention, f"{name}_norm", getattr(attention, f"{name}_proj"))
        module.register_forward_hook(lambda module, args, output, name=name: projected.update({name: output}))
    options = {"positions": "compact"} if kind == "llava, compact" else {}
    with lp_patch.applied(model, ratio=0.4, layer=2, text_scorer="noting", **options):
        if kind in ("qwen2_vl", "qwen2_5_vl") and not PER_TOKEN:
            with pytest.raises(UnsupportedInputError, match=r"needs it as \(batch, tokens, 8\), got .* a newer transf"):
                model(**inputs)
            return
        model(**inputs)
    (got,) = seen
    for name, ours in got.items():
        plain = projected[name].view(*projected[name].shape[:2], ours.shape[1], -1).transpose(1, 2)
        torch.testing.assert_close(ours, plain[:, :, -ours.shape[2] :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rotary",
    [(), (torch.ones(3, 1, 6, 4),) * 2, (torch.ones(1, 6, 2),) * 2],
    ids=["none", "three axes", "a part of each head"],
)
def test_other_rotations_are_refused(rotary):
    given = stage2_input(torch.ones(6, 4), rotary=rotary)
    with pytest.raises(
        UnsupportedInputError, match=r"needs it as \(batch, tokens, 4\), got .* use another text_scorer"
    ):
        TEXT_SCORERS["iwp"].score(given)


def test_rotations_that_scale_are_undone():
    angle = torch.rand(1, 6, 2)
    cos, sin = (torch.cat([f(angle)] * 2, dim=2) * 1.3 for f in (torch.cos, torch.sin))
    x = torch.randn(1, 1, 6, 4)
    turned = x * cos + torch.cat([-x[..., 2:], x[..., :2]], dim=3) * sin
    given = stage2_input(torch.ones(6, 4), rotary=(cos, sin))
    torch.testing.assert_close(given.unrotated(turned), x)
    torch.testing.assert_close(given.unrotated(turned[:, :, 2:]), x[:, :, 2:])


def test_another_way_of_rotating_is_refused(monkeypatch):
    model = tiny_llava()
    module = sys.modules[type(model.model.language_model.layers[0].self_attn).__module__]
    interleaved = lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)  # noqa: E731
    monkeypatch.setattr(module, "rotate_half", interleaved)
    with pytest.raises(lp_patch.UnsupportedModelError, match=r"decoder layer 5 \(LlamaAttention\) rotates .* another"):
        lp_patch.apply(model, text_scorer="iwp")
    lp_patch.apply(model, text_scorer="last")


@torch.no_grad()
def test_the_page_in_contributing(own_catalogue, capsys):
    page = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) < 30
    model = tiny_llava(seed=10, kv_heads=2)
    ids, pixels = tokens(3, "image", 5), images(1)
    names = {"model": model, "inputs": batch([ids], pixels)}
    exec(code, names)
    trace = names["patch"].trace
    kept = sorted(best(vision_maps(model, pixels)[0][0].norm(dim=1).tolist(), 18))
    everyone = received_from(lambda last_visual, end: [i for i in range(end) if i - 3 in {-3, -2, -1, *kept} or i > 38])
    _, _, stage2, scores = whole(model, ids, pixels, kept, 2, 6, everyone)
    assert trace.stage1[0].tolist() == kept
    assert trace.stage2[0].tolist() == stage2
    torch.testing.assert_close(trace.stage2_scores[0].tolist(), scores, rtol=1e-4, atol=1e-6)
    assert re.search(r"scorer='longest' +ours: .*text_scorer='everyone' +the mean", capsys.readouterr().out, re.DOTALL)
