"""LLaVA in its authors' own package, whose method merges before generate(), against the masked oracle.

The package pins torch and transformers of 2023; without its pins (`pip install --no-deps`) it runs with transformers 5,
and with 4.57 its forward alone does.
"""

import pytest
import torch
import transformers
from masked import expected
from tiny import EOS, LAYERS, PAD, SIDE, V5, VOCAB, WIDTH, N, images
from torch.nn.functional import pad
from transformers import CLIPVisionConfig, CLIPVisionModel

import lp_patch

llava = pytest.importorskip(
    "llava.model.language_model.llava_llama",
    reason="pip install --no-deps llava-torch==1.2.2.post1",
    exc_type=ImportError,
)
generates = pytest.mark.skipif(
    not V5, reason="with this transformers the package cannot generate: its forward takes no cache_position"
)
Processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)

IMAGE = -200  # the package's placeholder: one for a whole image
HIDDEN = 32
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


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A folder with a random CLIP tower and its processor, as the package loads them."""
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=14 * SIDE,
        patch_size=14, projection_dim=WIDTH,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)
    Processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(tower):
    def tiny(seed=0, dtype=torch.float64, **options):
        torch.manual_seed(seed)
        config = llava.LlavaConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=PAD,
            bos_token_id=EOS, eos_token_id=EOS, pretraining_tp=1, mm_vision_tower=tower, mm_hidden_size=WIDTH,
            mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2, mm_vision_select_feature="patch",
            use_mm_proj=True, **options,
        )  # fmt: skip
        model = llava.LlavaLlamaForCausalLM(config)
        model.get_vision_tower().load_model()
        model = model.to(dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "embed" in name:
                    parameter.normal_(0, 1.0)
                elif parameter.dim() > 1:
                    parameter.normal_(0, 1.2 * parameter[0].numel() ** -0.5)
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = None  # random models must not stop at random
        return model

    return tiny


def padded(rows, side):
    """Rows of ids -> ids (B, S) and mask (B, S)."""
    length = max(map(len, rows))
    short = [(length - len(row), 0) if side == "left" else (0, length - len(row)) for row in rows]
    ids = [pad(torch.tensor(row), at, value=PAD) for row, at in zip(rows, short, strict=True)]
    masks = [pad(torch.ones(len(row), dtype=torch.long), at) for row, at in zip(rows, short, strict=True)]
    return torch.stack(ids), torch.stack(masks)


class Grown:
    """The language model on prompts in which each image stands with all its tokens: what the oracle looks at."""

    def __init__(self, model, rows, pictures, side, new=()):
        """Rows of ids as the package takes them; `pictures`: rows -> (n, 3, H, W); `new`: said after each row."""
        self.model, self.config, self.dtype = model, model.config, model.dtype
        self.set_attn_implementation = model.set_attn_implementation
        grown = [[y for x in row for y in ([IMAGE] * N if x == IMAGE else [x])] for row in rows]
        self.width = max(map(len, grown))
        ids, mask = padded(grown, side)
        self.visual = []
        for row in ids:
            at = (row == IMAGE).nonzero().flatten().tolist()
            self.visual.append([at[start : start + N] for start in range(0, len(at), N)])
        if new:
            ids, mask = torch.cat([ids, torch.tensor(new)], dim=1), pad(mask, (0, len(new[0])), value=1)
        self.inputs = {"input_ids": ids, "attention_mask": mask}
        tower, projector = model.get_vision_tower().vision_tower, model.model.mm_projector
        with torch.no_grad():
            self.features = [
                list(tower(x, output_hidden_states=True).hidden_states[-2][:, 1:]) if len(x) else [] for x in pictures
            ]
            self.embeds = model.model.embed_tokens(ids.clamp(min=0))
            for i, (own, at) in enumerate(zip(self.features, self.visual, strict=True)):
                for feature, where in zip(own, at, strict=True):
                    self.embeds[i, where] = projector(feature)

    def __call__(self, input_ids, **options):
        return self.model(inputs_embeds=self.embeds, **options)

    def want(self, **theirs):
        decoder, options = self.model.model, {"end": self.width, "features": self.features, **theirs}
        return expected(self, decoder.layers, decoder, self.inputs, self.visual, **options)


def pictures_of(rows):
    """Rows -> (n, 3, H, W), and the images as the package takes them: one, unused, for a row without any."""
    numbers = [row.count(IMAGE) for row in rows]
    pictures = [images(n, seed=i) for i, n in enumerate(numbers)]
    given = [x if len(x) else images(1, seed=99) for x in pictures]
    return pictures, torch.cat(given)


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
def test_forward(make, case, side):
    model = make(seed=1, tokenizer_padding_side=side)
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


@generates
@pytest.mark.parametrize("case", ["default", "learned", "wipe", "compact"])
def test_generate(make, case):
    model = make(seed=2, tokenizer_padding_side="left")
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
def test_beams_and_several_answers(make):
    model = make(seed=3, tokenizer_padding_side="left")
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


@torch.no_grad()
def test_full_budget_text_and_removal_bit_for_bit(make):
    model = make(seed=4, dtype=torch.float32, tokenizer_padding_side="left")
    _, given = pictures_of(PROMPTS)
    given = given.float()
    ids, mask = padded(PROMPTS, "left")
    text = torch.tensor([[5, 6, 7, 8]])

    def run():
        found = [model(ids, attention_mask=mask, images=given).logits, model(text).logits]
        if V5:
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
def test_a_prompt_that_is_cut_at_its_end(make):
    """Of an image that lies half outside, those tokens stay that would stay of the whole."""
    rows = torch.tensor([[5, IMAGE, 6, 7, IMAGE, 8]])
    _, given = pictures_of(rows.tolist())
    kept = []
    for length in (None, N + 30):
        model = make(seed=5, tokenizer_model_max_length=length)
        with lp_patch.applied(model, tokens=9, stage_ratio=1.0) as patch:
            assert model(rows, images=given).logits.shape[1] == (length or 2 * N + 4)
        kept.append(patch.trace.stage1[0].tolist())
    assert patch.trace.visual_tokens == [N + 27]
    assert max(kept[0]) >= N + 27
    assert kept[1] == [x for x in kept[0] if x < N + 27]


@torch.no_grad()
def test_labels(make):
    model = make(seed=6)
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


def test_what_is_refused(make):
    with pytest.raises(lp_patch.UnsupportedModelError, match="mm_patch_merge_type='spatial_unpad'"):
        lp_patch.apply(make(mm_patch_merge_type="spatial_unpad"))
    model = make()
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
def test_cls_reads_the_tower(make):
    model = make(seed=7)
    model.set_attn_implementation("eager")
    _, given = pictures_of(PROMPTS[:1])
    tower = model.get_vision_tower().vision_tower
    maps = tower(given, output_attentions=True).attentions[-2]  # of the layer that the features leave
    with lp_patch.applied(model, tokens=5, scorer="cls") as patch:
        model(torch.tensor(PROMPTS[:1]), images=given)
    torch.testing.assert_close(patch.trace.stage1_scores[0], maps[0, :, 0, 1:].mean(dim=0), **CLOSE)
    with pytest.raises(lp_patch.ConfigError, match="mm_vision_select_feature='cls_patch'"):
        model.get_vision_tower().select_feature = "cls_patch"
        lp_patch.apply(model, scorer="cls")
