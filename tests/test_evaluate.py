"""`lp_patch.evaluate` against plain loops, and what it leaves behind."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from tiny import EOS, WIDTH, batch, images, tiny_llava, tokens

import lp_patch
from lp_patch import ConfigError, UnsupportedInputError
from lp_patch.evaluate import Evaluation, Outcome

SETTINGS = {"two stages": {"tokens": 9}, "alone": {"tokens": 9, "stage_ratio": 1}}


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def prompts(count=4):
    """`count` batches of two padded rows."""
    rows = [(tokens(3, "image", 4 + i, seed=i), tokens(2, "image", 9, seed=50 + i)) for i in range(count)]
    return [batch(list(row), images(2, seed=i)) for i, row in enumerate(rows)]


def alone(given):
    """Each row of the batches as a prompt of its own, without padding."""
    for x in given:
        for row in range(len(x["input_ids"])):
            real = x["attention_mask"][row].bool()
            ids = x["input_ids"][row][real][None]
            yield {"input_ids": ids, "attention_mask": ids * 0 + 1, "pixel_values": x["pixel_values"][row : row + 1]}


def answer(model, prompt, new=3):
    output = model.generate(**prompt, max_new_tokens=new, do_sample=False)
    return output[0, prompt["input_ids"].shape[1] :].tolist()


def evaluate(model, given, settings=SETTINGS, **options):
    return lp_patch.evaluate(model, given, settings, max_new_tokens=3, progress=False, **options)


def test_agreement_and_averages_against_loops(model):
    result = evaluate(model, prompts())
    assert [x.name for x in result.outcomes] == ["full", *SETTINGS]
    for name, setting in SETTINGS.items():
        same, averages = [], []
        for prompt in alone(prompts()):
            reference = answer(model, prompt)
            with lp_patch.applied(model, setting) as patch:
                same.append(answer(model, prompt) == reference)
                layers = patch.trace.tokens_per_layer[0]
            averages.append(sum(layers) / len(layers))
        assert result[name].scores.tolist() == [float(x) for x in same]
        assert result[name].averages.tolist() == averages
    assert result["full"].scores.tolist() == [1.0] * 8
    assert result["full"].averages.tolist() == [36.0] * 8
    assert 0 < result["two stages"].scores.sum() < 8, "nothing to tell apart"
    # nine tokens for 6 layers, 2 of them first: 54 / 10 rounded up is 6, three times that 18
    assert result["two stages"].averages[0] == (2 * 18 + 4 * 6) / 6


def test_accuracy_by_labels(model):
    """Labels are compared with decoded text, in the order of the rows."""
    full = [" ".join(map(str, answer(model, x))) for x in alone(prompts())]
    labels = [text if i % 2 else "never" for i, text in enumerate(full)]
    result = evaluate(
        model, prompts(), labels=labels, decode=lambda ids: "  " + " ".join(map(str, ids.tolist())) + "\n"
    )
    assert result.measure == "accuracy"
    assert result["full"].scores.tolist() == [0.0, 1.0] * 4


def test_score_of_the_caller(model):
    """A share of equal tokens instead of equality."""

    def score(a, b):
        return np.mean(np.array(a) == np.array(b))

    result = evaluate(model, prompts(3), [{"tokens": 20}], score=score)
    want = []
    for prompt in alone(prompts(3)):
        reference = answer(model, prompt)
        with lp_patch.applied(model, tokens=20):
            want.append(np.mean(np.array(answer(model, prompt)) == np.array(reference)))
    assert result["tokens=20"].scores.tolist() == want
    assert set(want) - {0.0, 1.0}


def test_an_answer_ends_with_its_end_token(model):
    """Nothing after the end counts, be it of a row that waits for another."""
    free = [answer(model, x, 4) for x in alone(prompts(2))]
    model.generation_config.eos_token_id = [EOS, free[0][1]]
    seen = []
    try:
        evaluate(model, prompts(2), [{"tokens": 9}], decode=lambda ids: seen.append(ids.tolist()) or "")
    finally:
        model.generation_config.eos_token_id = None
    assert seen[0] == free[0][:2]
    assert all(free[0][1] not in ids[:-1] for ids in seen)


def test_all_is_as_before(model):
    patch = lp_patch.apply(model, tokens=4)
    inputs = prompts(1)[0]
    model(**inputs)
    before = [x.tolist() for x in patch.trace.stage2]
    model.model.language_model.train()
    try:
        result = evaluate(model, prompts(2))
        assert (model.training, model.model.language_model.training, model.model.language_model.layers[0].training) == (
            False,
            True,
            True,
        )
        assert patch.active and lp_patch.is_applied(model)
        with pytest.raises(ZeroDivisionError):
            evaluate(model, prompts(1), score=lambda a, b: 1 / 0)
        assert patch.active and model.model.language_model.training
    finally:
        model.eval()
    model(**inputs)
    assert [x.tolist() for x in patch.trace.stage2] == before
    patch.remove()
    assert evaluate(model, prompts(2)).to_dict() == result.to_dict(), "the patch took part"
    assert not lp_patch.is_applied(model)


def test_settings_with_a_pruner(model):
    pruner = lp_patch.LearnablePruner(WIDTH).double()
    result = evaluate(model, prompts(1), [{"tokens": 5, "scorer": "learned", "pruner": pruner}, {"tokens": 5}])
    names = [x.name for x in result.outcomes]
    assert names[1].startswith("tokens=5, scorer='learned', pruner='LearnablePruner(")
    assert names[2] == "tokens=5"
    config = lp_patch.PruningConfig(tokens=5, layer=3)
    assert evaluate(model, prompts(1), [config]).outcomes[1].settings == {"tokens": 5, "layer": 3}


def test_static_cache_after_it(model):
    """The hooks that stay for a static cache are there again."""
    patch = lp_patch.apply(model, tokens=4)
    inputs = prompts(1)[0]
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    before = model.generate(**inputs, **options)
    evaluate(model, prompts(1), [{"tokens": 9}])
    after = model.generate(**inputs, **options)
    assert before.tolist() == after.tolist()
    patch.remove()


def made(**scores):
    """An evaluation of these scores."""
    outcomes = [Outcome(name, {}, np.array(x, dtype=float), np.full(len(x), 9.0)) for name, x in scores.items()]
    return Evaluation("accuracy", tuple(outcomes), 0.95)


def test_intervals_are_paired():
    rng = np.random.default_rng(1)
    full = rng.random(300) < 0.8
    worse = full & (rng.random(300) < 0.95)
    result = made(full=full, worse=worse)
    gap = full.astype(float) - worse
    draws = [gap[rng.integers(0, 300, 300)].mean() for _ in range(4000)]
    mean, low, high = result.difference("worse")
    assert mean == -gap.mean()
    assert abs(-high - np.percentile(draws, 2.5)) < 0.006
    assert abs(-low - np.percentile(draws, 97.5)) < 0.006
    assert high - low < 0.6 * (result.score("full").high - result.score("full").low), "not paired"
    assert result.difference("full", "worse").mean == -mean
    assert result.difference("full") == (0, 0, 0)
    assert made(full=[1, 1, 1]).score("full") == (1, 1, 1)


def test_table_file_and_picture(model, tmp_path):
    result = evaluate(model, prompts(2), [{"tokens": x} for x in (4, 9)] + [{"tokens": 9, "stage_ratio": 1}])
    lines = str(result).splitlines()
    assert lines[0].startswith("lp_patch: agreement on 4 prompts") and len(lines) == 6
    assert lines[2].split()[:3] == ["full", "36.0", "100.0"]
    assert "2 settings" not in repr(result) and "4 settings on 4 prompts" in repr(result)
    result.save(tmp_path / "all.csv", command="this one")
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, want in zip(rows, result.to_dict()["settings"], strict=True):
        assert row["command"] == "this one" and row["measure"] == "agreement"
        assert json.loads(row["settings"]) == want["settings"]
        assert [float(x) for x in row["scores"].split()] == want["scores"]
        assert float(row["average"]) == want["average"]
    json.dumps(result.to_dict(), allow_nan=False)
    result.plot(tmp_path / "all.png")
    pixels = np.asarray(Image.open(tmp_path / "all.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 400 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    with pytest.raises(ConfigError, match="no setting is called 'nobody'"):
        result["nobody"]


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ([], {}, "one or more"),
        ({"full": {"tokens": 4}}, {}, 'none called "full"'),
        ([{"tokens": 4}, {"tokens": 4}], {}, "two settings are the same"),
        (lp_patch.PruningConfig(tokens=4), {}, "put a single one in a list"),
        ([4], {}, "one or more PruningConfigs or dicts"),
        ([{"token": 4}], {}, "unknown option 'token'"),
        (SETTINGS, {"labels": ["yes"] * 4}, "labels need decode"),
        (SETTINGS, {"labels": ["yes"] * 3, "decode": str}, "more prompts than the 3 labels"),
        (SETTINGS, {"labels": ["yes"] * 5, "decode": str}, "4 prompts and 5 labels"),
    ],
)
def test_refused(model, settings, options, words):
    with pytest.raises(ConfigError, match=words):
        evaluate(model, prompts(2), settings, **options)
    assert not lp_patch.is_applied(model)


def test_refused_prompts(model):
    with pytest.raises(ConfigError, match="put one alone in a list"):
        evaluate(model, prompts(1)[0])
    with pytest.raises(ConfigError, match="got 0 prompts"):
        evaluate(model, [])
    with pytest.raises(ConfigError, match="no processor output"):
        evaluate(model, ["What is there?"])
    with pytest.raises(UnsupportedInputError, match="padded on the right"):
        evaluate(model, [batch([tokens("image", 4), tokens("image", 7)], images(2), side="right")])
    with pytest.raises(UnsupportedInputError, match="holds labels"):
        evaluate(model, [{**prompts(1)[0], "labels": prompts(1)[0]["input_ids"]}])
    with pytest.raises(ConfigError, match="cannot generate"):
        evaluate(model.model, prompts(1), [lp_patch.PruningConfig(tokens=4)])
