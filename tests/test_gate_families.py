"""The gate in every family's stock model, against the same model told not to see the closed tokens."""

import pytest
import torch
from families import FAMILIES, make
from masked import masked_logits, merged
from test_gate import halving
from test_lifecycle import snapshot

from lp_patch import ConfigError
from lp_patch.training import GatedModel

CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}  # norms and rotary angles are float32


def looked_at(model, scene):
    """What the oracle runs on, its inputs, and each visual input's positions and the features (n, C) behind it."""
    if not hasattr(scene, "grown"):
        given, decoder = scene.forward(), model.get_decoder()
        seen = scene.features(model)
        if seen is None:
            embeds = merged(model, decoder, given)
            seen = [[embeds[row, at] for at in own] for row, own in enumerate(scene.visual)]
        return model, given, scene.visual, seen
    grown = scene.grown(model, scene.rows, scene.pictures, "left")
    return grown, grown.inputs, grown.visual, grown.features


def leftovers(model):
    """All but what an unpatched forward of Qwen leaves behind as well."""
    return {key: value for key, value in snapshot(model).items() if not key.endswith("rope_deltas")}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hard_gate_gives_what_removal_gives(family, attention):
    model, scene = make(family, attention=attention)
    model.requires_grad_(False)
    oracle, given, visual, seen = looked_at(model, scene)
    pruner = halving(seen[0][0].shape[-1])
    with torch.no_grad():  # half of them go, none on the border
        logits = pruner(torch.cat([x for own in seen for x in own]))
        margin = (logits[:, 1] - logits[:, 0]).sort().values
        pruner.fc2.bias[0] += margin[len(margin) // 2 - 1 : len(margin) // 2 + 1].mean()
    gone = torch.zeros(given["input_ids"].shape, dtype=torch.bool)
    for row, own in enumerate(visual):
        for at, features in zip(own, seen[row], strict=True):
            logits = pruner(features)
            gone[row, torch.tensor(at)[logits[:, 0] >= logits[:, 1]]] = True
    assert abs(int(gone.sum()) - sum(len(at) for own in visual for at in own) / 2) <= 1
    want = masked_logits(oracle, model.get_decoder().layers, given, [(0, gone)])
    before = leftovers(model)
    training = GatedModel(model, pruner)
    with torch.no_grad():
        got = model(**scene.forward(), use_cache=False).logits
    training.remove()
    assert leftovers(model) == before
    left = given["attention_mask"].bool() & ~gone
    torch.testing.assert_close(got[left], want[left], **CLOSE)


def test_prompts_that_grow_cannot_be_distilled():
    model, _ = make("llava_llama")
    with pytest.raises(ConfigError, match="grows its prompts"):
        GatedModel(model.requires_grad_(False), objective="distill")
