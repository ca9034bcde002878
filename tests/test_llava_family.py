"""LLaVA-NeXT, LLaVA-NeXT-Video, LLaVA-OneVision and Video-LLaVA, patched, against the masked oracle."""

import numpy as np
import pytest
import torch
from masked import expected
from PIL import Image
from tiny import CACHE, features_shown
from tiny_llava_family import (
    CLASSES,
    FRAMES,
    IMAGE,
    SHAPES,
    TILE,
    TILED,
    VIDEO,
    VOCAB,
    WIDTH,
    WITH_VIDEO,
    WORDS,
    Row,
    batch,
    joined,
    parts,
    processor,
    row,
    row_of,
    tiny,
)
from transformers import pipeline

import lp_patch

CLOSE = {"rtol": 1e-4, "atol": 3e-5, "check_dtype": False}  # generate() hands out float32 logits
NEW = 4

CASES = {
    "default": {},
    "tokens": {"tokens": 5},
    "learned": {"tokens": 5, "scorer": "learned"},
    "learned, half diverse": {"tokens": 5, "scorer": "learned", "diversity": 0.5},
    "stage 1 alone": {"tokens": 9, "stage_ratio": 1.0},
    "stage 2 alone": {"tokens": 13, "stage_ratio": 5.0},
    "other layer": {"tokens": 6, "layer": 4, "stage_ratio": 2.0},
    "wipe": {"tokens": 4, "wipe": 4},
    "compact": {"tokens": 5, "positions": "compact"},
}

# rows of one batch: text lengths, pictures of several shapes, videos
IMAGES = {
    "one": [(3, "wide", 6)],
    "sizes": [(3, "wide", 6), (2, "square", 4), (30, "small", 1)],
    "several": [(2, "tall", 3, "small", 5), (7,), ("wide", "wide", 4)],
    "no text after": [(4, "square"), (2, "tall", 3, "small"), (1, "wide")],
}
VIDEOS = {
    "one video": [(3, "video", 6)],
    "both": [(2, "video", 3, "tall", 4), (5,), ("small", 2, "video", 3), (2, "square", 5)],
    "several videos": [(2, "video", 3, "video", 4), (1, "video"), ("wide", "video", "small", 2)],
}


def scenes(family):
    return {**IMAGES, **(VIDEOS if family in WITH_VIDEO else {})}


def each(cases, families=tuple(CLASSES)):
    """family x its scenes x cases"""
    return [
        pytest.param(family, prompts, CASES[case], id=f"{family}-{name}-{case}")
        for family in families
        for name, prompts in scenes(family).items()
        for case in cases
    ]


def make_pruner(seed=3):
    torch.manual_seed(seed)
    return lp_patch.LearnablePruner(WIDTH, 16).double().eval()


def split_options(case):
    """The case's options as lp_patch takes them, and as the oracle does."""
    ours, theirs = dict(case), dict(case)
    if "wipe" in ours:
        ours["final_wipe_layer"] = ours.pop("wipe")
    if theirs.pop("scorer", None) == "learned":
        ours["pruner"] = theirs["pruner"] = make_pruner()
    return ours, theirs


def want(model, one, more=(), **theirs):
    """What the row alone must give; `more` tokens after the prompt choose nothing."""
    return expected(
        model, *parts(model), one.inputs(more), [one.visual], structural=[one.structural], end=len(one.ids), **theirs
    )


def rows_of(model, prompts):
    return [row(model, *prompt, seed=i) for i, prompt in enumerate(prompts)]


def restored(logits, left):
    """(S, vocab) logits as outputs have them: a removed token, one not `left` (S,), repeats the one before it."""
    return logits[left][(left.long().cumsum(0) - 1).clamp(min=0)]


def check_row(patch, i, logits, one, right):
    """Row i, padding cut off: the sets, the scores behind them, and the logits of every token that is left."""
    trace = patch.trace
    assert trace.visual_tokens[i] == one.counted
    assert trace.text_tokens[i] == len(one.ids) - one.counted
    assert trace.stage1[i].tolist() == right.stage1[0]
    assert trace.stage2[i].tolist() == right.stage2[0]
    if right.scores1[0] and trace.stage1_scores[i] is not None:
        torch.testing.assert_close(trace.stage1_scores[i].tolist(), right.scores1[0], rtol=1e-5, atol=1e-7)
    if right.scores2[0]:
        got = dict(zip(right.stage1[0], trace.stage2_scores[i].tolist(), strict=True))
        assert got == pytest.approx(right.scores2[0], rel=1e-4)
    left = right.left[0]
    assert left[one.structural].all()
    torch.testing.assert_close(logits, restored(right.logits[0], left), **CLOSE)


@pytest.mark.parametrize(("family", "prompts", "case"), each(["default", "learned", "wipe"]))
def test_padded_rows_equal_the_oracle_alone(family, prompts, case):
    model = tiny(family)
    rows = rows_of(model, prompts)
    ours, theirs = split_options(case)
    right = [want(model, one, **theirs) for one in rows]
    with lp_patch.applied(model, **ours) as patch, torch.no_grad():
        for side in ("left", "right"):
            inputs = batch(rows, side)
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            logits = model(**inputs).logits
            for i, one in enumerate(rows):
                check_row(patch, i, logits[i][inputs["attention_mask"][i].bool()], one, right[i])


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_options_and_eager_attention(family, case):
    # transformers' eager softmax runs in float32, where a fully masked float64 row is NaN, patched or not
    model = tiny(family, seed=1, dtype=torch.float32, attention="eager")
    ours, theirs = split_options(case)
    prompt = (2, "video", 3, "wide", 4) if family in WITH_VIDEO else (2, "small", 3, "wide", 4)
    rows = rows_of(model, [prompt, (3, "tall", 6)])
    inputs = batch(rows)
    with lp_patch.applied(model, **ours) as patch, torch.no_grad():
        logits = model(**inputs).logits
    for i, one in enumerate(rows):
        check_row(patch, i, logits[i][inputs["attention_mask"][i].bool()], one, want(model, one, **theirs))


PROMPTS = {
    "images": [(3, "wide", 6), (2, "tall", 3, "small", 5), (7,), (2, "small")],
    "videos": [(3, "video", 6), (5,), (2, "video", 3, "small", 4, "video", 2), (2, "video")],
}


def prompts_of(family):
    return [PROMPTS["images"]] + ([PROMPTS["videos"]] if family in WITH_VIDEO else [])


def generate(model, inputs, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    # a random model would say placeholders, and the oracle read them as such
    options |= {"suppress_tokens": [IMAGE, VIDEO], "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **options)


def check_steps(out, i, model, one, width, more=(), **theirs):
    """Every step's logits of output row i are the oracle's on what was generated until then."""
    new = [*more, *out.sequences[i, width:].tolist()]
    right = want(model, one, new, **theirs)
    start = len(one.ids) + len(more) - 1
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits[i], restored(right.logits[0], right.left[0])[start + step], **CLOSE)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("case", ["default", "learned", "wipe", "compact"])
def test_greedy(family, case):
    model = tiny(family, seed=2)
    ours, theirs = split_options(CASES[case])
    for prompts in prompts_of(family):
        rows = rows_of(model, prompts)
        inputs = batch(rows)
        with lp_patch.applied(model, **ours) as patch:
            out = generate(model, inputs)
        assert patch.trace.visual_tokens == [one.counted for one in rows]
        for i, one in enumerate(rows):
            check_steps(out, i, model, one, inputs["input_ids"].shape[1], **theirs)


@pytest.mark.parametrize("family", CLASSES)
def test_beams(family):
    model = tiny(family, seed=3)
    for prompts in prompts_of(family):
        rows = rows_of(model, prompts)
        inputs = batch(rows)
        with lp_patch.applied(model, tokens=5):
            out = generate(model, inputs, num_beams=2, num_return_sequences=2, length_penalty=0.0, output_scores=True)
        for i, sequence in enumerate(out.sequences):
            one, new = rows[i // 2], sequence[inputs["input_ids"].shape[1] :].tolist()
            right = want(model, one, new, tokens=5)
            logits = restored(right.logits[0], right.left[0])[len(one.ids) - 1 : -1]
            score = logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None]).sum()
            assert float(out.sequences_scores[i]) == pytest.approx(float(score), abs=1e-3)


@pytest.mark.parametrize("family", CLASSES)
def test_sampling_several_sequences(family):
    model = tiny(family, seed=4)
    for prompts in prompts_of(family):
        rows = rows_of(model, prompts)
        inputs = batch(rows)
        with lp_patch.applied(model, tokens=5):
            torch.manual_seed(0)
            out = generate(model, inputs, do_sample=True, num_return_sequences=2, top_k=0)
        for i in range(2 * len(rows)):
            check_steps(out, i, model, rows[i // 2], inputs["input_ids"].shape[1], tokens=5)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("case", ["tokens", "wipe", "compact"])
def test_text_turn_on_the_kept_cache(family, case):
    model = tiny(family, seed=5)
    ours, theirs = split_options(CASES[case])
    one = row(model, *((2, "video", 3, "tall", 4) if family in WITH_VIDEO else (2, "tall", 3, "small", 4)))
    with lp_patch.applied(model, **ours):
        first = generate(model, one.inputs())
        more = [*first.sequences[0, len(one.ids) :].tolist(), 9, 11, 13]
        ids = torch.tensor([[*one.ids, *more]])
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        out = generate(model, turn, **{CACHE: first[CACHE]})
    check_steps(out, 0, model, one, ids.shape[1], more, **theirs)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("case", ["tokens", "wipe"])
def test_turn_with_pictures_on_the_kept_cache(family, case):
    model = tiny(family, seed=5)
    ours, theirs = split_options(CASES[case])
    one = row(model, *((2, "video", 3, "tall", 4) if family in WITH_VIDEO else (2, "tall", 3, "small", 4)))
    two = row(model, *((2, "small", 3, "video", 4) if family in WITH_VIDEO else (2, "wide", 3)), seed=1)
    with lp_patch.applied(model, **ours) as patch:
        first = generate(model, one.inputs())
        said = Row(first.sequences[0, len(one.ids) :].tolist(), [], [], {})
        both = joined([one, said, two])
        ids = torch.tensor([both.ids])
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **two.shown}
        out = generate(model, turn, **{CACHE: first[CACHE]})
    new = out.sequences[0, ids.shape[1] :].tolist()
    then, now = both.visual[: len(one.visual)], both.visual[len(one.visual) :]
    given = {"structural": [both.structural], **theirs}
    before = expected(model, *parts(model), both.inputs(new), [then], end=len(one.ids), **given)
    right = expected(model, *parts(model), both.inputs(new), [now], end=len(both.ids), earlier=before.hidden, **given)
    assert (patch.trace.stage1[0].tolist(), patch.trace.stage2[0].tolist()) == (right.stage1[0], right.stage2[0])
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits[0], right.logits[0, len(both.ids) - 1 + step], **CLOSE)


@pytest.mark.parametrize("family", CLASSES)
def test_features_from_the_caller(family):
    model = tiny(family, seed=6)
    one = row(model, *((2, "video", 3, "tall", 4) if family in WITH_VIDEO else (2, "tall", 3, "small", 4)))
    shown = {name: one.shown[name] for name in ("pixel_values", "image_sizes") if name in one.shown}
    inputs = {name: x for name, x in one.inputs().items() if name not in one.shown}
    right = want(model, one, tokens=5)
    with lp_patch.applied(model, tokens=5) as patch, torch.no_grad():
        features = {"image": model.model.get_image_features(**shown, return_dict=True)}
        if family in WITH_VIDEO:
            features["video"] = model.model.get_video_features(one.shown["pixel_values_videos"], return_dict=True)
        logits = model(**inputs, mm_encoder_outputs=dict(features)).logits
        check_row(patch, 0, logits[0], one, right)
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        logits = model(inputs_embeds=embeds, **one.shown, **inputs).logits
        check_row(patch, 0, logits[0], one, right)


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSES)
def test_full_budget_and_text_alone_are_untouched_bit_for_bit(family):
    model = tiny(family, seed=7, dtype=torch.float32)
    texts = batch(rows_of(model, [(9,), (4,)]))
    pictures = [batch(rows_of(model, prompts)) for prompts in prompts_of(family)]
    for inputs, options in [(texts, {"tokens": 3}), *((inputs, {"ratio": 1.0}) for inputs in pictures)]:
        plain = model(**inputs, output_hidden_states=True)
        said = generate(model, inputs)
        with lp_patch.applied(model, **options) as patch:
            got = model(**inputs, output_hidden_states=True)
            assert torch.equal(generate(model, inputs).sequences, said.sequences)
        assert torch.equal(got.logits, plain.logits)
        assert all(map(torch.equal, got.hidden_states, plain.hidden_states))
        for name, modality in {"pixel_values": "image", "pixel_values_videos": "video"}.items():
            if name in inputs:
                assert torch.equal(features_shown(got, modality), features_shown(plain, modality))
        assert patch.trace.stage2[0].tolist() == list(range(patch.trace.visual_tokens[0]))


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSES)
def test_remove_restores(family):
    model = tiny(family, seed=8, dtype=torch.float32)
    for prompts in prompts_of(family):
        inputs = batch(rows_of(model, prompts))
        plain = model(**inputs).logits
        before = {name: set(module.__dict__) for name, module in model.named_modules()}
        patch = lp_patch.apply(model, tokens=4)
        assert not torch.equal(model(**inputs).logits, plain)
        patch.remove()
        assert torch.equal(model(**inputs).logits, plain)
        assert {name: set(module.__dict__) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("family", CLASSES)
def test_what_is_refused(family):
    model = tiny(family)
    with pytest.raises(lp_patch.ConfigError, match=r'needs a \[CLS\] token that ranks .* "diversity"'):
        lp_patch.apply(model, scorer="cls")
    with pytest.raises(lp_patch.PrunerError, match=str(WIDTH)):  # it reads what the language model is given
        lp_patch.apply(model, pruner=lp_patch.LearnablePruner(24, 16))
    assert not lp_patch.is_applied(model)


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("scorer", ["random", "uniform"])
def test_baselines_keep_in_a_batch_what_they_keep_alone(family, scorer):
    model = tiny(family)
    for prompts in prompts_of(family):
        rows = rows_of(model, prompts)
        with lp_patch.applied(model, tokens=5, scorer=scorer) as patch:
            model(**batch(rows))
            together = patch.trace
            for i, one in enumerate(rows):
                model(**one.inputs())
                assert torch.equal(patch.trace.stage1[0], together.stage1[i])
                # 6 layers, 2 of them on three times as many tokens: 9 and 3 of each input
                assert len(together.stage1[i]) == 9 * len(one.visual)
                assert len(together.stage2[i]) == 3 * len(one.visual)


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSES)
def test_inputs_that_touch(family):
    """Each image has a budget of its own; so has each video, where the model's features tell one from the next."""
    model = tiny(family)
    prompts = [(2, "small", "tall", "small", 4), *([(2, "video", "video", 4)] if family in WITH_VIDEO else [])]
    rows = rows_of(model, prompts)
    with lp_patch.applied(model, tokens=4, stage_ratio=1.0) as patch:
        model(**batch(rows))
    assert len(patch.trace.stage1[0]) == 12
    if family in WITH_VIDEO:
        assert len(patch.trace.stage1[1]) == (4 if family == "video_llava" else 8)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", TILED)
def test_line_breaks_are_known_by_any_dtype(family, dtype):
    model = tiny(family, dtype=torch.float32)
    one = row(model, *((2, "video", 3, "tall", 4) if family in WITH_VIDEO else (2, "tall", 3, "small", 4)))
    with lp_patch.applied(model, tokens=4) as patch:
        with torch.autocast("cpu", dtype):
            model(**one.inputs())
        assert patch.trace.visual_tokens == [one.counted]
        model.to(dtype)(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in one.inputs().items()})
        assert patch.trace.visual_tokens == [one.counted]


def pictures_of(shapes, seed):
    """Images of these heights and widths."""
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 255, (*SHAPES[shape][:2], 3), dtype=np.uint8)) for shape in shapes]


@pytest.mark.parametrize("family", CLASSES)
def test_processor_to_generate(family):
    model, make = tiny(family, seed=9), processor(family)
    texts = ["what is this <image> ?", "compare <image> to <image> and this ?", "what is this ?"]
    images = [pictures_of(["tall"], 0), pictures_of(["wide", "square"], 1), []]
    videos = [[], [], []]
    if family in WITH_VIDEO:
        texts += ["<video> what is this <image> ?"]
        images += [pictures_of(["small"], 2)]
        videos += [[np.random.default_rng(3).integers(0, 255, (FRAMES, TILE, TILE, 3), dtype=np.uint8)]]

    def process(texts, images, videos):
        # LLaVA-OneVision cuts an image into tiles only where it is its prompt's single one
        images = [x for x in images if x] if family == "llava_onevision" else [image for x in images for image in x]
        videos = [video for x in videos for video in x]
        options = {"return_legacy_image_output": False} if family == "video_llava" else {}  # its default is deprecated
        options |= {"return_tensors": "pt", "padding": True}
        return make(text=texts, images=images or None, videos=videos or None, **options).to(torch.float64)

    rows = [row_of(model, process([t], [i], [v])) for t, i, v in zip(texts, images, videos, strict=True)]
    inputs = process(texts, images, videos)
    with lp_patch.applied(model, tokens=5) as patch:
        out = generate(model, inputs)
        kept, words = patch.trace.visual_tokens, set(range(WORDS.index("what"), len(WORDS)))
        options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": sorted(set(range(VOCAB)) - words)}
        said = model.generate(**process(texts[:1], images[:1], videos[:1]), **options)[0, -NEW:]
        ask = pipeline("image-text-to-text", model=model, processor=make)
        legacy = {"return_legacy_image_output": False} if family == "video_llava" else {}
        answer = ask(text=texts[0], images=images[0], return_full_text=False, generate_kwargs=options, **legacy)
    assert answer[0]["generated_text"].split() == [WORDS[i] for i in said]
    assert [len(x.visual) for x in rows] == [1, 2, 0, 2][: len(rows)]
    assert kept == [one.counted for one in rows]
    for i, one in enumerate(rows):
        check_steps(out, i, model, one, inputs["input_ids"].shape[1], tokens=5)
    if family == "llava_onevision":
        assert kept[1] == 2 * 16  # two images, neither tiled


def test_onevision_shrinks_large_images():
    model = tiny("llava_onevision", seed=10, vision_aspect_ratio="anyres_max_2")
    rows = rows_of(model, [(2, "square", 5), (3, "small", 1)])
    whole = row(tiny("llava_onevision"), 2, "square", 5)
    assert rows[0].counted < whole.counted and len(rows[0].structural) < len(whole.structural)
    inputs = batch(rows)
    right = [want(model, one, tokens=5) for one in rows]
    with lp_patch.applied(model, tokens=5) as patch, torch.no_grad():
        logits = model(**inputs).logits
    for i, one in enumerate(rows):
        check_row(patch, i, logits[i][inputs["attention_mask"][i].bool()], one, right[i])
