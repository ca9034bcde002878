"""Who asks in stage 2: the prompt, never an answer; as labels, generate() and `patch.asking` tell it."""

import threading

import pytest
import tiny
import torch
from families import Scene, make
from tiny import PRE_ENCODES

import lp_patch

OPTIONS = {"tokens": 4, "layer": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
NEW = 4
ALL = (0, 1, 2)
families = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])


def answers(scene, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 50, (len(scene.inputs["input_ids"]), NEW), generator=generator)


def marked(inputs, scene):
    """Labels of the answers alone."""
    labels = inputs["input_ids"].clone()
    labels[:, : scene.inputs["input_ids"].shape[1]] = -100
    return labels


@torch.no_grad()
def forward(model, inputs, **more):
    return model(**inputs, **more).logits


def generate(model, scene, **options):
    mute = {0, *(getattr(model.config, f"{name}_token_id", 0) for name in ("image", "video"))}
    out = model.generate(
        **scene.inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True,
        suppress_tokens=sorted(mute), **options,
    )  # fmt: skip
    return out.sequences[:, -NEW:], torch.stack(out.logits, dim=1)


def kept(patch):
    return [[x.tolist() for x in rows] for rows in (patch.trace.stage1, patch.trace.stage2)]


@families
def test_an_answer_does_not_ask_where_labels_mark_it(family):
    model, scene = make(family, seed=180)
    new = answers(scene)
    inputs = scene.forward(new)
    want = scene.want(model, new, **OPTIONS)
    with lp_patch.applied(model, **OPTIONS) as patch:
        logits = forward(model, inputs, labels=marked(inputs, scene))
        sets = kept(patch)
        unmarked = forward(model, inputs)
    assert sets == [want.stage1, want.stage2]
    torch.testing.assert_close(logits[want.left], want.logits[want.left], **CLOSE)
    assert not torch.allclose(unmarked[want.left], logits[want.left], atol=1e-2)  # without labels nobody can know


@families
def test_labels_on_everything_mark_no_answer(family):
    """Row by row: 0 has labels everywhere, 1 on its answer, 2 has no picture."""
    model, scene = make(family, seed=81)
    new = answers(scene)
    inputs = scene.forward(new)
    labels = marked(inputs, scene)
    labels[0] = inputs["input_ids"][0]
    with lp_patch.applied(model, **OPTIONS) as patch:
        mixed, sets = forward(model, inputs, labels=labels), kept(patch)
        everything = forward(model, inputs, labels=inputs["input_ids"])
        everybody, unmarked = forward(model, inputs), kept(patch)
        answered = forward(model, inputs, labels=marked(inputs, scene))
    assert torch.equal(everything, everybody)
    assert sets[1][0] == unmarked[1][0]
    assert torch.equal(mixed[0], everybody[0]) and torch.equal(mixed[1], answered[1])


def llava(*rows, dtype=torch.float64):
    """A batch of llava for these rows of parts."""
    ids = [tiny.tokens(*parts, seed=i) for i, parts in enumerate(rows)]
    inputs = tiny.batch(ids, tiny.images(sum(parts.count("image") for parts in rows), dtype=dtype))
    at = [(x == tiny.IMAGE).nonzero().flatten().tolist() for x in inputs["input_ids"]]
    visual = [[x[i : i + tiny.N] for i in range(0, len(x), tiny.N)] for x in at]
    return Scene(inputs, visual, projector="multi_modal_projector")


def test_without_text_after_its_image_a_row_asks_with_the_last_token_before_its_answer():
    model, scene = tiny.tiny_llava(seed=82, kv_heads=2), llava((6, "image"), (3, "image", 3))
    new = answers(scene)
    inputs = scene.forward(new)
    want = scene.want(model, new, **OPTIONS)
    with lp_patch.applied(model, **OPTIONS) as patch:
        logits = forward(model, inputs, labels=marked(inputs, scene))
        assert kept(patch) == [want.stage1, want.stage2]
        torch.testing.assert_close(logits[want.left], want.logits[want.left], **CLOSE)
        said, steps = generate(model, scene)
    want = scene.want(model, said, **OPTIONS)
    there = want.left[:, -NEW - 1 : -1]  # the prompt's own last token may be gone
    assert there[:, 1:].all()
    torch.testing.assert_close(steps[there], want.logits[:, -NEW - 1 : -1][there], **CLOSE)


@families
def test_generation_keeps_the_same_tokens_however_it_decodes(family):
    model, scene = make(family, seed=83)
    with lp_patch.applied(model, **OPTIONS) as patch:
        new, steps = generate(model, scene)
        sets = kept(patch)
        for options in ({"use_cache": False}, {"cache_implementation": "static"}):
            again = generate(model, scene, **options)
            assert again[0].tolist() == new.tolist() and kept(patch) == sets
            torch.testing.assert_close(again[1], steps, **CLOSE)
        beams = [generate(model, scene, num_beams=3, use_cache=cached)[0].tolist() for cached in (True, False)]
        assert beams[0] == beams[1]
        assert [x[::3] for x in kept(patch)] == sets  # uncached: every row three times in the last step
        # a forward on what was said: log-probabilities as generation had them
        inputs = scene.forward(new)
        logits = forward(model, inputs, labels=marked(inputs, scene))
        assert kept(patch) == sets
    torch.testing.assert_close(logits[:, -NEW - 1 : -1], steps, **CLOSE)


@families
def test_guesses_do_not_ask(family):
    """Prompt look-up and an assistant: their first forward shows guesses after the prompt."""
    for seed in (84, 85, 86):
        model, scene = make(family, which=(0,), seed=seed)
        assistant, _ = make(family, which=(0,), seed=seed + 10)
        ways = [{"prompt_lookup_num_tokens": 3}]
        if not family.startswith("qwen"):  # unpatched, an assistant of Qwen's is given no types of its tokens
            ways.append({"assistant_model": assistant})
        if not PRE_ENCODES:
            ways = ways[:1]
        with lp_patch.applied(model, **OPTIONS) as patch:
            new, steps = generate(model, scene)
            sets = kept(patch)
            for options in ways:
                again = generate(model, scene, **options)
                assert again[0].tolist() == new.tolist() and kept(patch) == sets
                torch.testing.assert_close(again[1], steps, **CLOSE)


# ---------------------------------------------------------------------- patch.asking


def last_turn(scene):
    """A mask for the last tokens of each row, as many as its last turn has; and the positions that it keeps quiet."""
    ids = scene.inputs["input_ids"]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, count in enumerate((3, 1, 2)):
        mask[row, -count:] = True
    structural = scene.structural or [[] for _ in ids]
    quiet = [sorted({*(~own).nonzero().flatten().tolist(), *x}) for own, x in zip(mask, structural, strict=True)]
    return mask, quiet


@families
def test_asking(family):
    model, scene = make(family, seed=87)
    mask, quiet = last_turn(scene)
    want = scene.want(model, structural=quiet, **OPTIONS)
    with lp_patch.applied(model, **OPTIONS) as patch:
        everybody = forward(model, scene.forward())
        with patch.asking(mask):
            logits = forward(model, scene.forward())
            assert kept(patch) == [want.stage1, want.stage2]
            new, steps = generate(model, scene)
            sets = kept(patch)
            uncached = generate(model, scene, use_cache=False)
            assert kept(patch) == sets == [want.stage1, want.stage2]
            generate(model, scene, num_beams=3, use_cache=False)
            assert [x[::3] for x in kept(patch)] == sets
            scored = scene.forward(new)
            for more in (mask, torch.nn.functional.pad(mask, (0, NEW))):
                with patch.asking(more):  # of the prompt, or of everything with nothing of the answer
                    found = forward(model, scored, labels=marked(scored, scene)) if more is not mask else None
            assert kept(patch) == sets
        assert torch.equal(forward(model, scene.forward()), everybody)
    torch.testing.assert_close(logits[want.left], want.logits[want.left], **CLOSE)
    assert not torch.allclose(logits[want.left], everybody[want.left], atol=1e-2)
    torch.testing.assert_close(uncached[1], steps, **CLOSE)
    torch.testing.assert_close(found[:, -NEW - 1 : -1], steps, **CLOSE)
    want = scene.want(model, new, structural=quiet, **OPTIONS).logits[:, -NEW - 1 : -1]
    torch.testing.assert_close(steps, want, **CLOSE)


@families
def test_asking_refuses_what_does_not_fit(family):
    model, scene = make(family, seed=88)
    mask, _ = last_turn(scene)
    nobody = mask.clone()
    nobody[1] = False
    before = torch.zeros_like(mask)
    before[:, :2] = True
    with lp_patch.applied(model, **OPTIONS) as patch:
        for wrong in (mask[:, :-1], mask[:2], mask[0], mask[None]):
            with patch.asking(wrong), pytest.raises(lp_patch.UnsupportedInputError, match=r"must be \(batch, tokens\)"):
                forward(model, scene.forward())
        for wrong, row in ((nobody, 1), (before, 0)):
            with patch.asking(wrong), pytest.raises(lp_patch.UnsupportedInputError, match=f"in row {row} no token"):
                forward(model, scene.forward())
        forward(model, scene.forward())
    with lp_patch.applied(model, ratio=1.0) as patch, patch.asking(nobody):
        forward(model, scene.forward())  # nothing is chosen, so nobody need ask


def test_asking_is_of_its_block_and_its_thread():
    model, scene = make("llava", seed=89)
    mask, _ = last_turn(scene)
    other = mask.clone()
    other[:, -4:] = True
    other[:, -1] = False
    found = []
    with lp_patch.applied(model, **OPTIONS) as patch:
        everybody = forward(model, scene.forward())
        with patch.asking(mask):
            outer = forward(model, scene.forward())
            with pytest.raises(ZeroDivisionError), patch.asking(other):
                inner = forward(model, scene.forward())
                raise ZeroDivisionError
            assert torch.equal(forward(model, scene.forward()), outer)
            thread = threading.Thread(target=lambda: found.append(forward(model, scene.forward())))
            thread.start()
            thread.join()
            assert torch.equal(forward(model, scene.forward()), outer)
        assert torch.equal(forward(model, scene.forward()), everybody)
    assert torch.equal(found[0], everybody)
    assert not torch.equal(inner, outer) and not torch.equal(inner, everybody)
