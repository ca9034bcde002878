"""`lp_patch.check`, and models of types that nobody declared."""

import copy
import re
import time
from dataclasses import replace

import pytest
import torch
from test_types import generate
from tiny_models import TYPES, make
from transformers import AutoConfig, AutoModelForImageTextToText

import lp_patch
from lp_patch import UnsupportedModelError, registry

# types whose declaration is the default one
PLAIN = ("vipllava", "glm4v", "glm4v_moe", "pp_chart2table", "paddleocr_vl", "kimi_k25", "cosmos3_edge", "lighton_ocr")
# what the default declaration is refused for
REFUSED = {
    "qwen3_5": "its layers are full, recurrent: undeclared, only full causal ones are trusted",
    "llava:window": "its layers are masked: undeclared, only full causal ones are trusted",
    "paligemma": "its tokens see later ones too",
    "molmo2": "its tokens see later ones too",
    "ovis2": "a tiny twin can be made: AttributeError: 'Encoded' object has no attribute 'visual_indicator_features'",
    "idefics2": "has no 'language_model.layers' below Idefics2Model",
    "cosmos3_omni": "pruned equals masked, in a padded batch: ",
    "ernie4_5_vl_moe": "pruned equals masked, in a padded batch: IndexError: The shape of the mask",
    "deepseek_vl_hybrid": "a tiny twin can be made: ValueError: Both pixel_values and high_res_pixel_values",
}


@pytest.fixture
def undeclared(monkeypatch):
    """A registry from which types can be taken."""
    lp_patch.supported()
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))

    def take(kind):
        return registry._adapters.pop(kind.split(":")[0])

    return take


# no twin can be made by rule
NOT_TRIED = {
    "gemma4", "gemma4:vision", "gemma4:layered", "gemma4:shared", "gemma4_unified", "step3p7", "dots3_note", "emu3",
    "deepseek_vl_hybrid", "granite_docling", "nemotron_h_omni", "ovis2", "gemma3n", "gemma3n:shared",
}  # fmt: skip
# nor can layers without keys be told what not to see
NOT_MASKED = NOT_TRIED | {
    "lfm2_vl", "lfm3_vl", "qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr",
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_passes(kind):
    model, _ = make(kind, dtype=torch.float32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = lp_patch.check(model)
    assert found.failed is None and found.ok == (kind not in NOT_TRIED), str(found)
    asked = {name for name, passed, _ in found.rows if passed}
    assert ("pruned equals masked, in a padded batch" in asked) == (kind not in NOT_MASKED)
    assert not lp_patch.is_applied(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert found.family in str(found)


@pytest.mark.parametrize("kind", PLAIN)
def test_an_undeclared_type_is_tried_and_patched(kind, undeclared):
    model, scene = make(kind, seed=1)
    with lp_patch.applied(model, tokens=4, layer=2) as patch:
        want = generate(model, scene)
        kept = patch.trace.stage2
    undeclared(kind)
    asked = [name for name, passed, _ in lp_patch.check(model).rows if passed]
    assert len(asked) == 9
    with pytest.warns(UserWarning, match=f"nobody has declared the model type '{kind}'"):
        patch = lp_patch.apply(model, tokens=4, layer=2)
    found = generate(model, scene)
    assert [x.tolist() for x in patch.trace.stage2] == [x.tolist() for x in kept]
    assert torch.equal(torch.stack(found.logits), torch.stack(want.logits))
    copied = copy.deepcopy(model)
    assert torch.equal(generate(copied, scene).sequences, found.sequences)
    lp_patch.remove(model)
    assert not lp_patch.is_applied(model)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_default_does_not_fit_is_refused(kind, undeclared):
    model, _ = make(kind, dtype=torch.float32)
    undeclared(kind)
    assert not lp_patch.check(model).ok
    with pytest.raises(UnsupportedModelError, match=re.escape(REFUSED[kind])):
        lp_patch.apply(model)
    assert not lp_patch.is_applied(model)


def test_a_wrong_adapter_is_found_out(undeclared):
    """DeepStack's features are added in the first layers: stage 2 must not cut before."""
    model, _ = make("cosmos3_omni", dtype=torch.float32)
    lp_patch.register(replace(undeclared("cosmos3_omni"), first_cut=None))
    assert lp_patch.check(model).failed.startswith("pruned equals masked, in a padded batch: ")


BIG = ("got_ocr2", "cosmos3_edge", "gemma3", "lfm2_vl", "qwen2_5_vl", "internvl", "llava_next", "qwen3_vl")


@pytest.mark.parametrize("model_type", BIG)
def test_the_twin_of_a_full_size_config(model_type):
    """In seconds; the model lies nowhere."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type))
    start = time.monotonic()
    found = lp_patch.check(model)
    assert found.ok and any(name.startswith("pruned equals") for name, passed, _ in found.rows if passed is not False)
    assert time.monotonic() - start < 60  # two seconds on a quiet machine


def test_no_vision_language_model():
    with pytest.raises(UnsupportedModelError, match="give the whole model"):
        lp_patch.check(make("vipllava")[0].get_decoder())


def test_a_model_that_fails_is_not_called_right(monkeypatch):
    model, _ = make("vipllava", dtype=torch.float32)

    def forward(self, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(type(model), "forward", forward)
    found = lp_patch.check(model)
    assert not found.ok and "RuntimeError: broken" in str(found) and "nothing was run" in str(found)
