"""Towers and language models that a family can be put together with, beside those of the other tests.

What the projector of each family is given, and what its tests combine:

    family                        towers                       one row of the projector's input is
    LLaVA                         CLIP, SigLIP                 a picture
    LLaVA                         Pixtral                      all pictures of the call, of any sizes: `pictures` tells
    LLaVA-NeXT, OneVision, ...    CLIP, SigLIP                 a tile or frame: stage 1 runs after merging
    VideoLLaVA                    CLIP                         a picture or frame: after merging
    InternVL                      InternViT                    a tile: after merging
    Mistral 3                     Pixtral                      all pictures of the call: after merging
    Qwen2-VL, 2.5, 3, 3-MoE       their own                    all pictures of the call: after merging
    Idefics3, SmolVLM             their own                    a tile: after merging
"""

import copy
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from families import FAMILIES, Scene, make
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

import lp_patch
from lp_patch import compat, registry

CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
NEW = 3
OPTIONS = {"tokens": 6, "layer": 2}
PATCH = 4
SIZES = [[(4, 4)], [(6, 6), (3, 5)], []]  # rows -> pictures, in patches


def pixtral(seed=0, dtype=torch.float64):
    """A random LLaVA over a Pixtral tower, whose projector is given all pictures of a call in one row."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
            patch_size=PATCH, image_size=64,
        ),
        text_config=LlamaConfig(
            vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=tiny.PAD, bos_token_id=3, eos_token_id=2,
        ),
        image_token_id=tiny.IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if "embed" in name else 1.2 * parameter[0].numel() ** -0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [tiny.PAD, tiny.IMAGE]
    return model


@dataclass
class Pictures(Scene):
    """A batch of pictures of several sizes."""

    def features(self, model):
        """Rows -> pictures -> (n, C): the projector's one row, cut."""
        seen = []
        handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            model(**self.forward())
        handle.remove()
        (rows,) = seen[0]
        pieces = iter(rows.split([len(x) for row in self.visual for x in row]))
        return [[next(pieces) for _ in row] for row in self.visual]


def pictures(model, which=(0, 1, 2)):
    generator, rows, found = torch.Generator().manual_seed(0), [], []
    for i in range(len(SIZES)):
        row = [8, 9 + i]
        for h, w in SIZES[i]:
            row += [tiny.IMAGE] * (h * w) + [7]
            if i in which:
                found.append(torch.randn(3, h * PATCH, w * PATCH, generator=generator))
            else:
                torch.randn(3, h * PATCH, w * PATCH, generator=generator)
        rows.append([*row, 10 + i, 20 + i, 30 + i])
    inputs = tiny.batch([rows[i] for i in which], None)
    if found:
        height, width = (max(x.shape[axis] for x in found) for axis in (1, 2))
        pixels = torch.zeros(len(found), 3, height, width, dtype=model.dtype)
        for pixel, x in zip(pixels, found, strict=True):
            pixel[:, : x.shape[1], : x.shape[2]] = x
        inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor([x.shape[1:] for x in found])}
    visual = []
    for i, ids in zip(which, inputs["input_ids"], strict=True):
        at = iter((ids == tiny.IMAGE).nonzero().flatten().tolist())
        visual.append([[next(at) for _ in range(h * w)] for h, w in SIZES[i]])
    return Pictures(inputs, visual)


@torch.no_grad()
def forward(model, scene):
    return model(**scene.forward()).logits


def generate(model, scene, **options):
    out = model.generate(
        **scene.inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return out.sequences[:, -NEW:], torch.stack(out.logits, dim=1)


def check(model, scene, options=OPTIONS):
    """A forward and greedy generation against the masked oracle."""
    want, plain = scene.want(model, **options), forward(model, scene)
    with lp_patch.applied(model, **options) as patch:
        logits = forward(model, scene)
        kept = patch.trace
        new, steps = generate(model, scene)
    assert [[x.tolist() for x in y] for y in (kept.stage1, kept.stage2)] == [want.stage1, want.stage2]
    torch.testing.assert_close(logits[want.left], want.logits[want.left], **CLOSE)
    assert not torch.allclose(logits[want.left], plain[want.left], atol=0.1)
    torch.testing.assert_close(steps, scene.want(model, new, **options).logits[:, -NEW - 1 : -1], **CLOSE)


# ---------------------------------------------------------------------- pictures in one row of the projector


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1, 2)])
def test_pixtral(which):
    model = pixtral()
    check(model, pictures(model, which))


@pytest.mark.parametrize("scorer", ["diversity", "uniform", "random"])
def test_pixtral_rows_equal_themselves_alone(scorer):
    model = pixtral(seed=1)
    with lp_patch.applied(model, **OPTIONS, scorer=scorer) as patch:
        together = forward(model, pictures(model))
        batch = patch.trace
        assert "x less" in str(patch.report()) or "x0." in str(patch.report())
        for row in range(3):
            scene = pictures(model, (row,))
            alone = forward(model, scene)[0]
            assert torch.equal(patch.trace.stage1[0], batch.stage1[row])
            assert torch.equal(patch.trace.stage2[0], batch.stage2[row])
            torch.testing.assert_close(together[row, -len(alone) :], alone, **CLOSE)
    # the same for each picture, whatever its size
    assert [len(x) for x in batch.stage1] == [12, 24, 0] and [len(x) for x in batch.stage2] == [4, 8, 0]


def test_pixtral_beams():
    """Beams repeat each picture; each beam's choices are the row's own."""
    model = pixtral(seed=2)
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 3}
    with lp_patch.applied(model, **OPTIONS) as patch:
        together = model.generate(**pictures(model, (0, 1)).inputs, **options)
        assert len(patch.trace.stage1) in (2, 6)
        for row in (0, 1):
            alone = model.generate(**pictures(model, (row,)).inputs, **options)
            assert together[row, -NEW:].tolist() == alone[0, -NEW:].tolist()


def test_a_projector_whose_rows_are_no_pictures_is_refused_unless_the_adapter_says_so(monkeypatch):
    """A third party's adapter for such a family, written as for LLaVA with CLIP."""
    lp_patch.supported()
    model = pixtral()
    own = registry._adapters["llava"]
    monkeypatch.setattr(registry, "_adapters", {**registry._adapters, "llava": replace(own, pictures=None)})
    with lp_patch.applied(model, **OPTIONS):
        with pytest.raises(lp_patch.UnsupportedInputError, match="its rows are not one image each"):
            forward(model, pictures(model))
        with pytest.raises(lp_patch.UnsupportedInputError, match="its rows are not one image each"):
            forward(model, pictures(model, (1,)))
    wrong = replace(own, pictures=lambda base, arguments: [16, 51])
    monkeypatch.setattr(registry, "_adapters", {**registry._adapters, "llava": wrong})
    with lp_patch.applied(model, **OPTIONS), pytest.raises(lp_patch.UnsupportedInputError, match="which the adapter"):
        forward(model, pictures(model))


# ---------------------------------------------------------------------- layers that compute with position ids

SCALED = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 5,
    "llama_4_scaling_beta": 0.7,
}  # fmt: skip
TEXTS = {
    "ministral3": {"model_type": "ministral3", "rope_parameters": SCALED},
    "mistral4": {
        "model_type": "mistral4", "rope_parameters": SCALED, "num_key_value_heads": 4, "head_dim": 8,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    },
}  # fmt: skip


def mistral(kind, dtype=torch.float64, which=(0, 1, 2), seed=60):
    model, scene = make("mistral3", dtype, which, seed=seed, **copy.deepcopy(TEXTS[kind]))  # configs write into dicts
    if kind == "mistral4":
        model.set_experts_implementation("eager")  # the default computes in no float64
    return model, scene


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("which", [(0,), (0, 1, 2)])
def test_attention_that_is_scaled_by_positions(kind, which):
    model, scene = mistral(kind, which=which)
    assert registry.find_parts(model).true_positions
    check(model, scene, {"tokens": 3, "layer": 2})


@pytest.mark.parametrize("kind", TEXTS)
def test_scaled_attention_rows_equal_themselves_alone(kind):
    model, scene = mistral(kind)
    inputs = scene.forward()
    inputs["position_ids"] = None  # counted by transformers from the batch's start, padding too
    with lp_patch.applied(model, tokens=3), torch.no_grad():
        together, (new, steps) = forward(model, scene), generate(model, scene)
        for row in range(3):
            _, own = mistral(kind, which=(row,))
            alone, (said, logits) = forward(model, own)[0], generate(model, own)
            torch.testing.assert_close(together[row, -len(alone) :], alone, **CLOSE)
            assert said.tolist() == new[row : row + 1].tolist()
            torch.testing.assert_close(logits[0], steps[row], **CLOSE)


@pytest.mark.parametrize("kind", TEXTS)
def test_scaled_attention_on_a_static_cache_and_with_compact_positions(kind):
    model, scene = mistral(kind)
    with lp_patch.applied(model, tokens=3, layer=2):
        new, steps = generate(model, scene, cache_implementation="static")
    torch.testing.assert_close(steps, scene.want(model, new, tokens=3, layer=2).logits[:, -NEW - 1 : -1], **CLOSE)
    options = {"tokens": 3, "layer": 2, "positions": "compact"}
    check(model, scene, options)


@pytest.mark.parametrize("kind", TEXTS)
def test_scaled_attention_is_refused_under_flash_attention(kind):
    """FlashAttention takes the gaps in true position ids for packed sequences."""
    model, scene = mistral(kind, which=(0,))
    model.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    for positions in ("original", "compact"):  # compact ones have the gaps of stage 2
        refused = pytest.raises(lp_patch.UnsupportedInputError, match="packed sequences")
        with lp_patch.applied(model, tokens=3, positions=positions), refused:
            forward(model, scene)


@pytest.mark.parametrize("family", FAMILIES)
def test_which_layers_compute_with_position_ids(family):
    """In the text models that the families of this test suite have: none."""
    parts = registry.find_parts(make(family, which=(0,))[0])
    assert not parts.true_positions
    assert not compat.computes_with(parts.attention[0], "no_such_argument")


def test_who_computes_with_an_argument():
    class Reads(torch.nn.Module):
        def forward(self, x, position_ids=None, mask=None, **kwargs):
            return self.inner(x * position_ids, position_ids=position_ids, mask=mask, **kwargs)

    class HandsOnUnderAnotherName(torch.nn.Module):
        def forward(self, x, position_ids=None):
            return self.inner(x, places=position_ids)

    assert compat.computes_with(Reads(), "position_ids") and not compat.computes_with(Reads(), "mask")
    assert not compat.computes_with(Reads(), "kwargs_only")
    assert compat.computes_with(HandsOnUnderAnotherName(), "position_ids")
    unreadable = {}
    exec("def forward(self, x, position_ids=None):\n    return self.inner(x, position_ids=position_ids)", unreadable)
    assert compat.computes_with(type("Unreadable", (), {"forward": unreadable["forward"]})(), "position_ids")
