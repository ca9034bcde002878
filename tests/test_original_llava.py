"""LLaVA in its authors' own package, whose method merges before generate(), against the masked oracle.

The package pins torch and transformers of 2023; without its pins (`pip install --no-deps`) it runs with transformers 5
before 5.24, and with 4.57 and 5.24 its forward alone does.
"""

import pytest
import torch
from tiny import CACHE, ORIGINAL_GENERATES, N
from tiny_original import IMAGE, WIDTH, Grown, padded, pictures_of, tiny

import lp_patch

generates = pytest.mark.skipif(not ORIGINAL_GENERATES, reason="with this transformers the package cannot generate")

NEW = 4
CLOSE = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}  # generate() hands out float32 logits
PROMPTS = [[5, 6, IMAGE, 7, 8, 9], [IMAGE, 11, 12, IMAGE, 13], [14, 15, 16], [17, IMAGE]]
CASES = {
    "default": {},
    "tokens": {"tokens": 5},
    "learned": {"tokens": 5, "pruner": True},
    "stage 1 alone": {"tokens": 9, "stage_ratio": 1.0},
    "stage 2 alone": {"tokens": 13, "stage_ratio": 5.0},
    "wipe": {"tokens": 4, "wipe": 4},
    "compact": {"tokens": 5, "positions": "compact"},
}


def split_options(case):
    """The case's options as lp_patch takes them, and as the oracle does."""
    ours, theirs = dict(case), dict(case)
    if "wipe" in ours:
        ours["final_wipe_layer"] = ours.pop("wipe")
    if "pruner" in ours:
        torch.manual_seed(3)
        ours["pruner"] = theirs["pruner"] = lp_patch.LearnablePruner(WIDTH, 16).double().eval()
    return ours, theirs


def restored(right):
    """(S, vocab) logits of a single row as outputs have them: a removed token repeats the one before it."""
    left = right.left[0]
    return right.logits[0][left][(left.long().cumsum(0) - 1).clamp(min=0)]


def generate(model, ids, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward(case, side):
    model = tiny(seed=1, tokenizer_padding_side=side)
    ours, theirs = split_options(case)
    pictures, given = pictures_of(PROMPTS)
    ids, mask = padded(PROMPTS, side)
    grown = Grown(model, PROMPTS, pictures, side)
    plain = model(ids, attention_mask=mask, images=given).logits
    real = grown.inputs["attention_mask"].bool()
    same = grown(**grown.inputs).logits
    torch.testing.assert_close(plain[real], same[real])  # the oracle's prompt is the package's
    right = grown.want(**theirs)
    with lp_patch.applied(model, **ours) as patch:
        got = model(ids, attention_mask=mask, images=given).logits
    assert patch.trace.visual_tokens == [N, 2 * N, 0, N]
    assert [x.tolist() for x in patch.trace.stage1] == right.stage1
    assert [x.tolist() for x in patch.trace.stage2] == right.stage2
    assert got.shape == plain.shape
    torch.testing.assert_close(got[right.left], right.logits[right.left], **CLOSE)
    if "pruner" in theirs:
        for i, scores in enumerate(right.scores1):
            torch.testing.assert_close(patch.trace.stage1_scores[i].tolist() if scores else [], scores, **{
                **CLOSE, "check_dtype": True
            })  # fmt: skip


@pytest.mark.skipif(CACHE != "cache", reason="before transformers 5.24 it can")
def test_from_5_24_on_the_package_cannot_generate_unpatched():
    """Once this fails, `tiny.ORIGINAL_GENERATES` and the table of docs/modes.md are wrong."""
    assert not ORIGINAL_GENERATES
    with pytest.raises(TypeError, match="unexpected keyword argument 'cache'"):
        generate(tiny(), torch.tensor([[5, 6, 7, 8]]))


@generates
@pytest.mark.parametrize("case", ["default", "learned", "wipe", "compact"])
def test_generate(case):
    model = tiny(seed=2, tokenizer_padding_side="left")
    ours, theirs = split_options(CASES[case])
    pictures, given = pictures_of(PROMPTS)
    ids, mask = padded(PROMPTS, "left")
    with lp_patch.applied(model, **ours) as patch:
        out = generate(model, ids, images=given, attention_mask=mask)
        assert patch.trace.visual_tokens == [N, 2 * N, 0, N]
    for i, prompt in enumerate(PROMPTS):
        grown = Grown(model, [prompt], pictures[i : i + 1], "left", new=out.sequences[i : i + 1].tolist())
        right = restored(grown.want(**theirs))
        for step, logits in enumerate(out.logits):
            torch.testing.assert_close(logits[i], right[grown.width - 1 + step], **CLOSE)


@generates
def test_beams_and_several_answers():
    model = tiny(seed=3, tokenizer_padding_side="left")
    rows = PROMPTS[:2]
    pictures, given = pictures_of(rows)
    ids, mask = padded(rows, "left")
    ours, theirs = split_options(CASES["learned"])
    with lp_patch.applied(model, **ours) as patch:
        beams = generate(
            model, ids, images=given, attention_mask=mask, num_beams=2, num_return_sequences=2, length_penalty=0.0,
            output_scores=True,
        )  # fmt: skip
        torch.manual_seed(0)
        drawn = generate(model, ids, images=given, attention_mask=mask, do_sample=True, num_return_sequences=2, top_k=0)
        assert patch.trace.visual_tokens == [N, N, 2 * N, 2 * N]
        scores = patch.trace.stage1_scores
        assert torch.equal(scores[0], scores[1]) and torch.equal(scores[2], scores[3])
    for i in range(4):
        for out in (beams, drawn):
            new = out.sequences[i : i + 1].tolist()
            grown = Grown(model, rows[i // 2 : i // 2 + 1], pictures[i // 2 : i // 2 + 1], "left", new=new)
            logits = grown.want(**theirs).logits[0, grown.width - 1 : -1]
            if out is beams:
                score = logits.log_softmax(-1).gather(1, torch.tensor(new[0])[:, None]).sum()
                assert float(out.sequences_scores[i]) == pytest.approx(float(score), abs=1e-3)
            else:
                torch.testing.assert_close(torch.stack([x[i] for x in out.logits]), logits, **CLOSE)


@generates
@pytest.mark.parametrize("case", ["tokens", "wipe", "compact"])
def test_text_turn_on_the_kept_cache(case):
    model = tiny(seed=8, tokenizer_padding_side="left")
    ours, theirs = split_options(CASES[case])
    rows = PROMPTS[:1]
    pictures, given = pictures_of(rows)
    with lp_patch.applied(model, **ours):
        out = generate(model, torch.tensor(rows), images=given)
        more = [*out.sequences[0].tolist(), 21, 22, 23]
        again = torch.tensor([[*rows[0], *more]])
        out = generate(model, again, images=given, **{CACHE: out[CACHE]})
    grown = Grown(model, rows, pictures, "left", new=torch.tensor([[*more, *out.sequences[0].tolist()]]))
    logits = grown.want(**theirs).logits[:, -NEW - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), logits, **CLOSE)


@torch.no_grad()
def test_full_budget_text_and_removal_bit_for_bit():
    model = tiny(seed=4, dtype=torch.float32, tokenizer_padding_side="left")
    _, given = pictures_of(PROMPTS)
    given = given.float()
    ids, mask = padded(PROMPTS, "left")
    text = torch.tensor([[5, 6, 7, 8]])

    def run():
        found = [model(ids, attention_mask=mask, images=given).logits, model(text).logits]
        if ORIGINAL_GENERATES:
            found += [
                generate(model, ids, images=given, attention_mask=mask).sequences,
                generate(model, text).sequences,
            ]
        return found

    plain = run()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    with lp_patch.applied(model, ratio=1.0):
        assert all(map(torch.equal, run(), plain))
    with lp_patch.applied(model, tokens=5) as patch:
        pruned = run()
        assert torch.equal(pruned[1], plain[1]) and not torch.equal(pruned[0], plain[0])
        model(ids, attention_mask=mask, images=given)
        assert patch.trace.visual_tokens == [N, 2 * N, 0, N]
        model(text)
        assert patch.trace.visual_tokens == [0]
    assert all(map(torch.equal, run(), plain))
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before


@torch.no_grad()
def test_a_prompt_that_is_cut_at_its_end():
    """Of an image that lies half outside, those tokens stay that would stay of the whole."""
    rows = torch.tensor([[5, IMAGE, 6, 7, IMAGE, 8]])
    _, given = pictures_of(rows.tolist())
    kept = []
    for length in (None, N + 30):
        model = tiny(seed=5, tokenizer_model_max_length=length)
        with lp_patch.applied(model, tokens=9, stage_ratio=1.0) as patch:
            assert model(rows, images=given).logits.shape[1] == (length or 2 * N + 4)
        kept.append(patch.trace.stage1[0].tolist())
    assert patch.trace.visual_tokens == [N + 27]
    assert max(kept[0]) >= N + 27
    assert kept[1] == [x for x in kept[0] if x < N + 27]


@torch.no_grad()
def test_labels():
    model = tiny(seed=6)
    pictures, given = pictures_of(PROMPTS[:1])
    ids = torch.tensor(PROMPTS[:1])
    labels = ids.masked_fill(ids == IMAGE, -100)
    grown = Grown(model, PROMPTS[:1], pictures, "right")
    logits = grown.want(tokens=5).logits
    wanted = grown.inputs["input_ids"].masked_fill(grown.inputs["input_ids"] == IMAGE, -100)
    with lp_patch.applied(model, tokens=5):
        out = model(ids, images=given, labels=labels)
    assert out.logits.shape == logits.shape
    loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], wanted[0, 1:])
    torch.testing.assert_close(out.loss, loss.float())


def test_what_is_refused():
    with pytest.raises(lp_patch.UnsupportedModelError, match="mm_patch_merge_type='spatial_unpad'"):
        lp_patch.apply(tiny(mm_patch_merge_type="spatial_unpad"))
    model = tiny()
    _, given = pictures_of(PROMPTS[:1])
    ids = torch.tensor(PROMPTS[:1])
    with lp_patch.applied(model, tokens=5), torch.no_grad():
        with pytest.raises(lp_patch.UnsupportedInputError, match="1 images was given 2 tiles"):
            model(ids, images=[torch.cat([given, given])])
        merged = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, given)[4]
        model(inputs_embeds=merged)
        with pytest.raises(lp_patch.UnsupportedInputError, match="already merged"):
            model(inputs_embeds=merged[:, 1:])


@torch.no_grad()
def test_cls_reads_the_tower():
    model = tiny(seed=7)
    model.set_attn_implementation("eager")
    _, given = pictures_of(PROMPTS[:1])
    tower = model.get_vision_tower().vision_tower
    tower.set_attn_implementation("eager")  # before 5.23 it does not hear of the model's
    maps = tower(given, output_attentions=True).attentions[-2]  # of the layer that the features leave
    with lp_patch.applied(model, tokens=5, scorer="cls") as patch:
        model(torch.tensor(PROMPTS[:1]), images=given)
    torch.testing.assert_close(patch.trace.stage1_scores[0], maps[0, :, 0, 1:].mean(dim=0), **CLOSE)
    with pytest.raises(lp_patch.ConfigError, match="mm_vision_select_feature='cls_patch'"):
        model.get_vision_tower().select_feature = "cls_patch"
        lp_patch.apply(model, scorer="cls")
