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

KINDS = [x for x in FAMILIES if x != "llava_llama"] + list(TYPES)
ASKS = "what it asks of the device depends on its inputs"
# what is not captured, and why
ENCODERS = {
    "idefics2": "cannot reshape",  # it looks for images that are all zeros
    "idefics3": "cannot reshape",
    "smolvlm": ASKS,
    "emu3": ASKS,  # its images are tokens of a codebook, which the host reads
}
LAYERS = "a model with windows or with layers without keys"
# masks made by vmap, through which no pretence reaches
NO_PRETENCE = {"gemma3", "gemma4:vision", "shieldgemma2"}


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
    return sum(region._graph is not None for region in regions.kept.values())


@pytest.mark.parametrize("kind", [x for x in KINDS if x not in NO_PRETENCE])
@torch.no_grad()
def test_a_replay_equals_what_runs_as_it_comes(kind, monkeypatch):
    model, options, inputs = made(kind, seed=3)
    shown, want, kept = others(inputs), [], []
    with lp_patch.applied(model, **options) as patch:
        for x in shown:
            want.append(model(**x).logits)
            kept.append((*patch.trace.stage1, *patch.trace.stage2))
    with pretended_gpu(monkeypatch, model), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with lp_patch.applied(model, compile=True, **options) as patch:
            for _ in range(2):
                for x, logits, sets in zip(shown, want, kept, strict=True):
                    torch.testing.assert_close(model(**on_gpu(x)).logits.cpu(), logits, rtol=1e-4, atol=1e-4)
                    found = (*patch.trace.stage1, *patch.trace.stage2)
                    assert [x.tolist() for x in found] == [x.tolist() for x in sets]
            encoders, layers = captured(patch._engine.encoders), captured(patch._engine.languages)
    said = [str(x.message) for x in caught if "is not captured" in str(x.message)]
    family = kind.partition(":")[0]
    expected = [ENCODERS[family]] if family in ENCODERS else []
    assert bool(encoders) == (not expected)
    if not layers:
        expected.append(LAYERS)
    assert len(said) == len(expected) and all(why in found for why, found in zip(expected, said, strict=True)), said
