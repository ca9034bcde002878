"""`apply(compile=True)` on a pretended GPU: what is captured of every model type; a replay holds nothing old."""

import warnings

import pytest
import torch
from families import FAMILIES
from families import make as make_family
from pretended_gpu import on_gpu, pretended_gpu
from tiny_models import TYPES
from tiny_models import make as make_type
from tiny_models.common import scene as scene_of

import lp_patch
from lp_patch.regions import Region

KINDS = [*FAMILIES, *TYPES]
ASKS = "what it asks of the device depends on its inputs"
# what is not captured, and why
ENCODERS = {
    "emu3": ASKS,  # its images are tokens of a codebook, which the host reads
}
LAYERS = {
    "dots3_note": "a cache of DynamicIndexedLayer",
    "mistral_large4": "a cache of DynamicIndexedLayer",
    "hy_v4_vl": "attn_implementation='eager'",
    "step3p7": ASKS,  # its experts are a loop over those that anybody wants
}


def made(kind, **options):
    """A tiny model of a kind, options of a patch, and the inputs of one prompt."""
    if kind in FAMILIES:
        model, scene = make_family(kind, torch.float32, (0,), **options)
        inputs, more = scene.forward(), {}
    else:
        model, _ = make_type(kind, dtype=torch.float32, **options)
        inputs = floats(scene_of(TYPES[kind], which=(0,)).forward(), torch.Tensor.float)
        more = {"layer": TYPES[kind].layer}
    if any(
        hasattr(x, "_can_set_experts_implementation") and x._can_set_experts_implementation() for x in model.modules()
    ):
        model.set_experts_implementation("batched_mm")  # the loop over experts asks which of them anybody wants
    return model, {"tokens": 4, **more}, inputs


def floats(inputs, change):
    return {
        name: change(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in inputs.items()
    }


def later(inputs):
    """The prompt with one more token of text before its images."""
    length = inputs["input_ids"].shape[1]
    return {
        name: torch.cat([x[:, -1:], x], dim=1) if isinstance(x, torch.Tensor) and x.shape[:2] == (1, length) else x
        for name, x in inputs.items()
    }


def others(inputs):
    """Other images, and the prompt's images elsewhere."""
    torch.manual_seed(5)
    return [inputs, floats(inputs, torch.randn_like), later(inputs)]


def captured(regions):
    return len(regions.kept)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_replay_equals_what_runs_as_it_comes(kind, monkeypatch):
    model, options, inputs = made(kind, seed=3)
    shown, want, kept = others(inputs), [], []
    with lp_patch.applied(model, **options) as patch:
        for x in shown:
            want.append(model(**x).logits)
            kept.append((*patch.trace.stage1, *patch.trace.stage2))
    captures, capture = [], Region._capture
    monkeypatch.setattr(Region, "_capture", lambda self, *given: (captures.append(self), capture(self, *given)))
    with pretended_gpu(monkeypatch, model), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lp_patch.applied(model, compile=True, **options) as patch:
            for _ in range(2):
                for x, logits, sets in zip(shown, want, kept, strict=True):
                    torch.testing.assert_close(model(**on_gpu(x)).logits.cpu(), logits, rtol=1e-4, atol=1e-4)
                    found = (*patch.trace.stage1, *patch.trace.stage2)
                    assert [x.tolist() for x in found] == [x.tolist() for x in sets]
            encoders, layers = captured(patch._engine.encoders), captured(patch._engine.languages)
            failed = len(patch._engine.encoders._refused) + len(patch._engine.languages._refused)
    assert len(captures) == encoders + layers + failed  # each shape once
    said = [str(x.message) for x in caught if "is not captured" in str(x.message)]
    family = kind.partition(":")[0]
    expected = [ENCODERS[family]] if family in ENCODERS else []
    assert bool(encoders) == (not expected)
    expected += [LAYERS[family]] if family in LAYERS else []
    assert bool(layers) == (family not in LAYERS)
    assert len(said) == len(expected) and all(why in found for why, found in zip(expected, said, strict=True)), said


@torch.no_grad()
def test_a_state_that_padding_would_change_is_not_captured(monkeypatch):
    """Mamba's convolution has a bias: padding of zeros would not leave its state at zero."""
    model, options, inputs = made("nemotron_h_omni", seed=4)
    for name, x in model.named_parameters():
        if name.endswith("conv1d.bias"):
            x.normal_()
    with lp_patch.applied(model, **options):
        want = model(**inputs).logits
    with pretended_gpu(monkeypatch, model), pytest.warns(UserWarning, match="padding.*changes the state"):
        with lp_patch.applied(model, compile=True, **options) as patch:
            torch.testing.assert_close(model(**on_gpu(inputs)).logits.cpu(), want)
        assert not patch._engine.languages.kept


class Looks(torch.nn.Module):
    """Put around a vision tower: asks the device for something first."""

    def __init__(self, inner, ask):
        super().__init__()
        self.inner, self.ask, self.asked = inner, ask, []

    def forward(self, pixel_values, **more):
        self.asked.append(self.ask(pixel_values))
        return self.inner(pixel_values, **more)


@pytest.mark.parametrize(
    "ask, why",
    [
        (lambda x: x.shape[0] + torch.ones(2, device=x.device).sum().item(), None),
        (lambda x: (x > 0).sum().item(), ASKS),  # what it is told would be an earlier image's
        (lambda x: bool(x.any()), ASKS),
        (lambda x: x.mean().item() if len(x) else 0, ASKS),
        (lambda x: x.var(dim=(1, 2, 3)).histc(4).sum().item(), None),
    ],
    ids=["a constant", "the image", "whether there is one", "its mean", "a number of images"],
)
@torch.no_grad()
def test_what_a_tower_asks_is_learnt_if_no_image_changes_it(ask, why, monkeypatch):
    model, options, inputs = made("llava", seed=5)
    model.model.vision_tower = Looks(model.model.vision_tower, ask)
    want = []
    with lp_patch.applied(model, **options):
        for x in others(inputs):
            want.append(model(**x).logits)
    with pretended_gpu(monkeypatch, model), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lp_patch.applied(model, compile=True, **options) as patch:
            for x, logits in zip(others(inputs), want, strict=True):
                torch.testing.assert_close(model(**on_gpu(x)).logits.cpu(), logits, rtol=1e-4, atol=1e-4)
            assert captured(patch._engine.encoders) == (why is None)
    said = [str(x.message) for x in caught if "is not captured" in str(x.message)]
    assert len(said) == (why is not None) and all(why in x for x in said)


@pytest.mark.parametrize(
    "ask, captures",
    [(lambda ids: ids.shape[-1], True), (lambda ids: ids[..., 0].item(), False)],
    ids=["how many", "the first"],
)
@torch.no_grad()
def test_what_layers_ask_of_positions(ask, captures, monkeypatch):
    """A prompt of another length in the same bucket has others."""
    model, options, inputs = made("llava", seed=8)
    language, asked = model.model.language_model, []

    class Asking(type(language.rotary_emb)):
        def forward(self, x, position_ids):
            asked.append(ask(position_ids))
            return super().forward(x, position_ids)

    language.rotary_emb.__class__ = Asking
    with lp_patch.applied(model, **options):
        want = [model(**x).logits for x in others(inputs)]
    with pretended_gpu(monkeypatch, model), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lp_patch.applied(model, compile=True, **options) as patch:
            for x, logits in zip(others(inputs), want, strict=True):
                torch.testing.assert_close(model(**on_gpu(x)).logits.cpu(), logits, rtol=1e-4, atol=1e-4)
            assert bool(captured(patch._engine.languages)) == captures
    assert any(ASKS in str(x.message) for x in caught) != captures


@torch.no_grad()
def test_a_wait_that_nobody_knows_of_is_not_captured(monkeypatch):
    """As CUDA tells of it: a number that torch's C++ asks for, or a tensor of the host's that goes over unseen."""
    model, options, inputs = made("llava", seed=6)
    model.model.vision_tower = Looks(model.model.vision_tower, lambda x: torch.bincount(x.flatten().long().abs()))
    monkeypatch.setattr("lp_patch.host._DISTINCT", set())
    with lp_patch.applied(model, **options):
        want = model(**inputs).logits
    told = pytest.warns(UserWarning, match="synchronizing.*bincount.*not captured")
    with pretended_gpu(monkeypatch, model), told, lp_patch.applied(model, compile=True, **options):
        torch.testing.assert_close(model(**on_gpu(inputs)).logits.cpu(), want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_blank_images_run_as_they_come(monkeypatch):
    model, options, inputs = made("idefics3", seed=7)
    blank = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    assert blank["pixel_values"].dim() == 5
    with lp_patch.applied(model, **options):
        want = model(**inputs).logits
    with pretended_gpu(monkeypatch, model), lp_patch.applied(model, compile=True, **options) as patch:
        torch.testing.assert_close(model(**on_gpu(inputs)).logits.cpu(), want, rtol=1e-4, atol=1e-4)
        assert captured(patch._engine.encoders) == 1
        blank["pixel_values"][:, :1] = 0
        with pytest.warns(UserWarning, match="some are blank"), pytest.raises(ValueError, match="do not match"):
            model(**on_gpu(blank))  # as many placeholders as before: what it does unpatched
