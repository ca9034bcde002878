"""`lp_patch.calibrate`: criterion against generation itself, choice against plain loops; settings that travel."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_evaluate import alone
from tiny import EOS, IMAGE, WIDTH, N, batch, images, tiny_llava, tokens
from transformers import AutoProcessor, LogitsProcessor, LogitsProcessorList

import lp_patch
from lp_patch import ConfigError, PrunerError, PruningConfig, UnsupportedInputError
from lp_patch.answers import Answer
from lp_patch.calibrate import Calibration, Reference, Tried, ask, choose, doubts
from lp_patch.recommend import merged, recommended

CONFIG = PruningConfig(tokens=6, rounding="down")


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def prompts(count=2, seed=0):
    """`count` batches of two padded rows."""
    rows = [(tokens(3, "image", 4 + i % 3, seed=i), tokens(2, "image", 9, seed=50 + i)) for i in range(count)]
    return [batch(list(row), images(2, seed=seed + i)) for i, row in enumerate(rows)]


def calibrate(model, given, config=CONFIG, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lp_patch.calibrate: .* prompts are too few")
        return lp_patch.calibrate(model, given, config, progress=False, **options)


class Say(LogitsProcessor):
    """Makes generate() say one thing."""

    def __init__(self, words):
        self.words = list(words)

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.words.pop(0)] = 0
        return forced


def by_steps(model, prompt, words):
    """(T, V) log-probabilities while generate() says these words, one step after the other, on its cache."""
    given = {"max_new_tokens": len(words), "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**prompt, **given, logits_processor=LogitsProcessorList([Say(words)]))
    return torch.cat(out.logits).log_softmax(-1)


def test_divergence_is_that_of_generation(model):
    """Every row alone, generated step by step, against padded batches that are read at once."""
    result = calibrate(model, prompts(), answer_tokens=5)
    tried = {x.name: x for x in result.tried}
    assert list(tried)[:3] == ["default (layer 2, ratio 3)", "stage 1 alone", "layer 1, ratio 3"]
    checked = [tried[x] for x in ("default (layer 2, ratio 3)", "stage 1 alone", "layer 4, ratio 3")]
    for number, prompt in enumerate(alone(prompts())):
        # a picture's placeholder is no word of an answer
        out = model.generate(**prompt, max_new_tokens=5, do_sample=False, suppress_tokens=[IMAGE])
        words = out[0, prompt["input_ids"].shape[1] :].tolist()
        full = by_steps(model, prompt, words)
        for x in checked:
            with lp_patch.applied(model, x.config) as patch:
                pruned = by_steps(model, prompt, words)
                layers = patch.trace.tokens_per_layer[0]
            want = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(full, pruned, strict=True))
            # it counts in float32
            assert x.divergence[number] == pytest.approx(want, rel=1e-4)
            assert x.average == sum(layers) / len(layers)


def test_an_answer_ends_with_its_end_token(model):
    """What would follow the end counts for nothing."""
    given = prompts(1)
    words = ask(model, given, 4, progress=False)[0].answer.tokens[0].tolist()
    short = calibrate(model, given, answer_tokens=2)
    model.generation_config.eos_token_id = [EOS, words[1]]
    try:
        ended = calibrate(model, given, answer_tokens=4)
    finally:
        model.generation_config.eos_token_id = None
    for a, b in zip(ended.tried[:3], short.tried[:3], strict=True):
        assert a.divergence[0] == pytest.approx(b.divergence[0], rel=1e-6)


def test_all_settings_spend_the_same(model):
    result = calibrate(model, prompts(1), PruningConfig(tokens=12))
    assert all(11 < x.average <= 12 for x in result.tried)
    assert all(x.config.rounding == "down" for x in result.tried)
    assert [x.config.layer for x in result.tried] == [
        None,
        None,
        1,
        3,
        4,
        5,
        *[x.config.layer for x in result.tried[-3:]],
    ]
    assert [x.config.stage_ratio for x in result.tried] == [3, 1, 3, 3, 3, 3, 1.5, 2, 4]
    swept = [result.tried[0], *result.tried[2:-3]]
    best = min(swept, key=lambda x: x.divergence.mean())
    assert all(x.config.layer == best.config.layer for x in result.tried[-3:])


def test_options_hold_for_all(model):
    pruner = lp_patch.LearnablePruner(WIDTH).double()
    options = {"scorer": "learned", "final_wipe_layer": 4, "text_scorer": "last", "pruner": pruner}
    result = calibrate(model, prompts(1), PruningConfig(tokens=6), **options)
    assert result.scorer == "learned" and result.pruner is pruner
    assert {x.config.final_wipe_layer for x in result.tried} == {4}
    assert max(x.config.layer or 0 for x in result.tried) == 3
    assert [x.config.text_scorer for x in result.tried[:3]] == ["last", "text", "last"]


def test_known_answers_serve_again(model):
    known = ask(model, prompts(), 3, progress=False)
    first = calibrate(model, prompts(), answer_tokens=3)
    assert calibrate(model, known).to_dict() == first.to_dict()
    assert calibrate(model, known, PruningConfig(tokens=12)).tried[0].average > 11


def test_all_is_as_before(model):
    patch = lp_patch.apply(model, tokens=4)
    model.train()
    try:
        result = calibrate(model, prompts(1), answer_tokens=2)
        assert model.training and model.model.vision_tower.training
    finally:
        model.eval()
    assert patch.active
    patch.remove()
    assert calibrate(model, prompts(1), answer_tokens=2).to_dict() == result.to_dict(), "the patch took part"
    assert not lp_patch.is_applied(model)
    assert all(x.requires_grad and x.grad is None for x in model.parameters())


matrices = st.integers(2, 6).flatmap(
    lambda rows: st.integers(2, 8).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=rows, max_size=rows)
    )
)


@given(matrices)
def test_choice_against_loops(rows):
    n = len(rows[0])

    def beats(one, other):
        gaps = [b - a for a, b in zip(rows[one], rows[other], strict=True)]
        mean = sum(gaps) / n
        error = (sum((x - mean) ** 2 for x in gaps) / (n - 1) / n) ** 0.5
        # on the very edge rounding decides
        return None if abs(mean - error) < 1e-9 and mean != 0 else mean > error + 1e-12

    best = min(range(len(rows)), key=lambda x: (sum(rows[x]), x))
    answers = [beats(best, 0), beats(1, 0), beats(best, 1)]
    if None in answers:
        return
    want = best
    if not answers[0]:
        want = 0
    elif answers[1] and not answers[2]:
        want = 1
    assert choose(np.array(rows, dtype=float)) == want


def test_choice_by_hand():
    rng = np.random.default_rng(0)
    prompt = rng.exponential(1, 96)  # what all settings share
    noise = rng.normal(0, 0.1, (3, 96))
    noise -= noise.mean(axis=1, keepdims=True)
    assert choose(np.stack([prompt, prompt + 1, prompt - 0.3 + noise[0]])) == 2
    # 0.005 is half a standard error of the pairs
    assert choose(np.stack([prompt, prompt + 1, prompt - 0.005 + noise[0]])) == 0
    # stage 1 alone beats the default, and the best beats it by next to nothing
    assert choose(np.stack([prompt, prompt - 0.3 + noise[0], prompt - 0.305 + noise[1]])) == 1
    assert choose(np.stack([prompt, prompt - 0.3 + noise[0], prompt - 0.4 + noise[1]])) == 2


def made(*means, chosen=0, pruner=None):
    """A calibration with these divergences, on 4 prompts."""
    configs = [CONFIG, replace(CONFIG, stage_ratio=1), replace(CONFIG, layer=4), replace(CONFIG, layer=5)]
    tried = [Tried(f"setting {i}", configs[i], m + np.array([0.0, 0.1, 0.2, 0.3]), 6.0) for i, m in enumerate(means)]
    return Calibration(tuple(tried), chosen, 0.75, "diversity" if pruner is None else "covering", ("odd",), pruner)


def test_table_and_picture(tmp_path):
    result = made(1.0, 0.8, 0.5, chosen=2)
    text = str(result).splitlines()
    assert [line[0] for line in text[2:5]] == [" ", " ", ">"]
    assert "+0.500 ± 0.000" in text[4]
    assert "better than the default by 0.500 nats" in text[5] and "75% of samples" in text[5]
    assert text[-1] == "careful: odd"
    assert "The default stays" in str(made(1.0, 2.0))
    assert "setting 2, of 3 settings on 4 prompts" in repr(result)
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["gain"] == pytest.approx(0.5) and found["config"]["layer"] == 4
    assert [x["chosen"] for x in found["tried"]] == [False, False, True]
    result.plot(tmp_path / "plot.png")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "plot.png").convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_saved_settings_apply_alike(model, tmp_path):
    pruner = lp_patch.LearnablePruner(WIDTH).double()
    result = made(1.0, 0.8, 0.5, chosen=2, pruner=pruner)
    result = replace(result, tried=tuple(replace(x, config=replace(x.config, scorer="covering")) for x in result.tried))
    result.save(tmp_path)
    assert pruner.recommended == [], "the one in use changed"
    with lp_patch.applied(model, tmp_path) as patch:
        assert patch.config == result.config
        model(**prompts(1)[0])
        # 36 / (3 * 4 + 2) is 2.6, and (36 - 2 * 2) / 4 is 8
        assert patch.trace.tokens_per_layer[0] == [8, 8, 8, 8, 2, 2]
    # and whoever takes the pruner from there gets the same
    with lp_patch.applied(model, pruner=tmp_path, tokens=6, scorer="covering") as patch:
        assert patch.config == replace(result.config, scorer=patch.config.scorer)
    made(1.0, 0.8, chosen=1).save(tmp_path / "free")
    assert not (tmp_path / "free" / "model.safetensors").exists()
    assert PruningConfig.load(tmp_path / "free").stage_ratio == 1


# ---------------------------------------------------------------------- doubtful prompts


def test_few_prompts_warn(model):
    with pytest.warns(UserWarning, match="2 prompts are too few to tell settings apart: give 48"):
        result = lp_patch.calibrate(model, prompts(1), tokens=6, answer_tokens=1, progress=False)
    assert result.n == 2 and "careful: 2 prompts" in str(result)


def asked(answers, texts):
    """A batch with these answers (B, T) to these texts (B, S), after a picture of 3 or of 5 tokens and padding."""
    pictures = [[0] * (5 - size) + [IMAGE] * size for size in (3, 5)]
    rows = [[*pictures[i % 2], *text] for i, text in enumerate(texts.tolist())]
    ids = torch.tensor(rows)
    prompt = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    return Reference(prompt, Answer(answers, torch.ones_like(answers, dtype=torch.bool)), torch.zeros(0))


def test_prompts_of_one_kind_are_doubtful():
    # 37 of 48 answers are one of two
    answers = torch.tensor([5] * 20 + [6] * 17 + list(range(7, 18)))[:, None]
    texts = torch.tensor([[7, 8, 9]]).repeat(48, 1)
    found = doubts([asked(answers[:20], texts[:20]), asked(answers[20:], texts[20:])])
    assert len(found) == 2
    assert found[0].startswith("two answers make up 77%")
    assert found[1].startswith("100% of the prompts ask the same")
    mixed, other = torch.arange(48)[:, None] % 12 + 20, texts + torch.arange(48)[:, None] // 2
    assert doubts([asked(mixed, other)]) == ()
    # what follows an answer's end does not count
    reference = asked(torch.cat([answers * 0 + 5, mixed], dim=1), other)
    ended = reference.answer.valid.clone()
    ended[:, 1] = False
    (note,) = doubts([reference._replace(answer=reference.answer._replace(valid=ended))])
    assert note.startswith("two answers make up 100%")
    (note,) = doubts([asked(mixed[:47], other[:47])])
    assert note.startswith("47 prompts are too few")


def test_what_is_told(model, capsys):
    with pytest.warns(UserWarning, match="too few"):
        lp_patch.calibrate(model, prompts(1), tokens=6, answer_tokens=1)
    told = capsys.readouterr()
    assert "2 prompts in 1 batches, each answered and read by the full model: about" in told.err
    assert "9 settings, a pruned forward a batch each: about" in told.err
    assert told.out == ""


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"tokens": 6, "layer": 3}, "leave out layer"),
        ({"tokens": 6, "stage_ratio": 2}, "leave out stage_ratio"),
        ({"tokens": N}, f"tokens={N} prunes nothing of prompts with {N} visual tokens"),
        ({"ratio": 0.6, "scorer": "none"}, "has no stage 1 to compare with"),
        ({"tokens": 6, "scorer": "lerned"}, "did you mean 'learned'"),
    ],
)
def test_refused(model, config, words):
    with pytest.raises(ConfigError, match=words):
        calibrate(model, prompts(1), config, answer_tokens=1)
    assert not lp_patch.is_applied(model)


def test_refused_prompts(model):
    with pytest.raises(UnsupportedInputError, match="shows no picture"):
        calibrate(model, [batch([tokens(9), tokens(8)], None)], answer_tokens=1)
    with pytest.raises(ConfigError, match="got 0 prompts"):
        calibrate(model, [])


# ---------------------------------------------------------------------- settings that travel with a pruner

ENTRY = {"scorer": "learned", "text_scorer": "text", "tokens": 6, "layer": 4, "stage_ratio": 2.0, "prompts": 96}


@pytest.fixture
def pruner():
    return lp_patch.LearnablePruner(WIDTH, recommended=[ENTRY]).double()


@pytest.mark.parametrize("config", [None, {"tokens": 6}])
def test_apply_takes_what_is_recommended(model, pruner, config):
    options = {"tokens": 6} if config is None else {}
    with lp_patch.applied(model, config, pruner=pruner, **options) as patch:
        assert (patch.config.layer, patch.config.stage_ratio) == (4, 2.0)
        model(**prompts(1)[0])
        assert patch.report().settings["layer"] == 4
        # 36 / (2 * 4 + 2) is 3.6
        assert patch.trace.tokens_per_layer[0] == [8, 8, 8, 8, 4, 4]


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 7},
        {"ratio": 6 / 36},
        {"tokens": 6, "scorer": "covering"},
        {"tokens": 6, "text_scorer": "last"},
        {"tokens": 6, "layer": 2},
        {"tokens": 6, "stage_ratio": 3.0},
        {"tokens": 6, "final_wipe_layer": 5},
        {"config": PruningConfig(tokens=6)},
        {"config": {"tokens": 6, "layer": None}},
    ],
)
def test_apply_does_as_it_is_told(model, pruner, options):
    with lp_patch.applied(model, pruner=pruner, **options) as patch:
        assert (patch.config.layer or 2, patch.config.stage_ratio) == (2, 3.0)


def test_recommendations_travel(model, pruner, tmp_path):
    pruner.save_pretrained(tmp_path)
    assert lp_patch.LearnablePruner.from_pretrained(tmp_path).recommended == [ENTRY]
    card = (tmp_path / "README.md").read_text()
    assert "## Recommended settings" in card
    assert "| learned | text | 6 | 4 | 2.0 | 96 |" in card
    config = json.loads((tmp_path / "config.json").read_text())
    del config["recommended"]  # a file of an earlier version
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = lp_patch.LearnablePruner.from_pretrained(tmp_path)
    assert old.recommended == []
    old.save_pretrained(tmp_path)
    assert "Recommended" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "entries",
    [{}, [1], [{"tokens": 6}], [{"scorer": "learned"}], [{**ENTRY, "rounding": "even"}], [{**ENTRY, "layer": 0}]],
)
def test_strange_recommendations_are_refused(entries):
    with pytest.raises(PrunerError, match="recommended"):
        lp_patch.LearnablePruner(WIDTH, recommended=entries)


def test_one_entry_for_a_strategy_at_a_budget():
    other = {"scorer": "learned", "text_scorer": "text", "ratio": 0.1, "layer": 3}
    newer = {**ENTRY, "layer": 5}
    assert merged([ENTRY, other], newer) == [other, newer]
    config = PruningConfig(ratio=0.1)
    assert recommended(config, [ENTRY, other], "learned", {"ratio"}).layer == 3
    assert recommended(config, [ENTRY, other], "covering", {"ratio"}) == config


# ---------------------------------------------------------------------- the document

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs" / "calibrate.md").read_text(encoding="utf-8")


class Words:
    """A tokenizer's decode."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids.tolist()))


@pytest.mark.filterwarnings("ignore:lp_patch.calibrate. 4 prompts are too few")
@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL))
def test_snippets_of_the_document(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_llava(dtype=torch.float32)
    given = [{**x, "pixel_values": x["pixel_values"].float()} for x in prompts()]
    # a tiny model says much in 32 tokens
    code = code.replace("prompts, tokens=32)", "prompts, tokens=32, answer_tokens=2)").replace(
        "ask(model, prompts)", "ask(model, prompts, 2)"
    )
    code = code.replace("settings)\n", "settings, max_new_tokens=2)\n")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (50, 40)).save(tmp_path / "pictures" / "1.png")
    (tmp_path / "asked.json").write_text(re.search(r"`(\[.*?), \.\.\.\]`", DOCUMENT, re.DOTALL)[1] + "]")
    processor = AutoProcessor.from_pretrained(ROOT / "examples" / "testbed" / "model")
    names = {"model": model, "prompts": given, "labels": ["1"] * 4, "tokenizer": Words(), "processor": processor}
    exec(code, names)
    assert capsys.readouterr().out
    assert not lp_patch.is_applied(model)
