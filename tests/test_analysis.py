"""The analyses against transformers' own attention maps, of the eager back-end."""

import families
import pytest
import torch
from PIL import Image

import lp_patch
from lp_patch import analysis


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl", "idefics3"])
def test_look(family):
    """Each token's share by who asks, and each word's map, as the maps say."""
    model, scene = families.make(family, dtype=torch.float32, which=(0, 1), attention="eager")
    inputs = scene.forward()
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    found = analysis.look(model, inputs)
    assert found.layers == list(range(1, len(maps) + 1))
    real = inputs["attention_mask"].bool()
    last_visual = [max(max(x) for x in row) for row in scene.visual]
    for number, whole in enumerate(maps):
        mean = whole.mean(dim=1)
        for row in range(2):
            asks = [i for i in range(real.shape[1]) if i > last_visual[row] and real[row, i]]
            askers = {"text": asks, "last": asks[-1:], "every": real[row].nonzero().flatten().tolist()}
            for name, who in askers.items():
                want = sum(mean[row, i] for i in who) / len(who)
                torch.testing.assert_close(found.received[name][number, row], want, atol=1e-5, rtol=1e-4)
            want = torch.stack([mean[row, i][found.visual[row]] for i in asks])
            torch.testing.assert_close(found.maps[row][number], want, atol=1e-5, rtol=1e-4)
            assert found.words[row] == [int(inputs["input_ids"][row, i]) for i in asks]


def test_plots_and_cls():
    model, scene = families.make("llava", dtype=torch.float32, which=(0,), attention="eager")
    inputs = scene.forward()
    found = analysis.look(model, inputs)
    assert found.share().shape == (len(found.layers), 1) and 0 < float(found.share().mean()) < 1
    for drawn in (found.plot_layers(), found.plot_positions(2)):
        assert isinstance(drawn, Image.Image) and len(drawn.getcolors(1 << 20)) > 20
    with pytest.raises(lp_patch.UnsupportedInputError, match="no attention of layer 99"):
        found.plot_positions(99)
    attention = analysis.cls_attention(model, inputs)
    layer = model.config.vision_feature_layer
    with torch.no_grad():
        maps = model.base_model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    want = maps[layer if layer >= 0 else len(maps) + layer].mean(dim=1)[:, 0, 1:]
    assert attention.shape == want.shape
    torch.testing.assert_close(attention, want, atol=1e-5, rtol=1e-4)


def test_sinks():
    attention = torch.full((1, 100), 0.005)
    attention[0, 7] = 0.4
    high, share = analysis.sinks(attention)
    assert high.nonzero().tolist() == [[0, 7]]
    torch.testing.assert_close(share, torch.tensor([0.4 / (0.4 + 99 * 0.005)]))


def test_refusals():
    model, scene = families.make("qwen2_vl", dtype=torch.float32, which=(0,))
    with pytest.raises(lp_patch.UnsupportedModelError, match=r"no \[CLS\]"):
        analysis.cls_attention(model, scene.forward())
    with lp_patch.applied(model, tokens=4), pytest.raises(lp_patch.UnsupportedInputError, match="patched"):
        analysis.look(model, scene.forward())
    model, scene = families.make("qwen2_vl", dtype=torch.float32, which=(2,))
    with pytest.raises(lp_patch.UnsupportedInputError, match="must hold visual tokens"):
        analysis.look(model, scene.forward())
