"""What people do around a forward: merged features, other ids, other arguments, hidden pictures, tuples."""

import warnings

import pytest
import tiny
import torch
from families import make
from tiny import CACHE

import lp_patch

OPTIONS = {"tokens": 4, "layer": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
ALL = (0, 1, 2)
MERGED = "images were encoded outside the model's forward"


@torch.no_grad()
def forward(model, scene, **more):
    return model(**{**scene.forward(), **more}).logits


def kept(patch):
    return [[x.tolist() for x in rows] for rows in (patch.trace.stage1, patch.trace.stage2)]


# ---------------------------------------------------------------------- features that the caller has merged


def by_encoding(model, inputs):
    """(V, D) by the model's own method."""
    given = {name: x for name, x in inputs.items() if name.startswith(("pixel", "image_"))}
    found = model.get_image_features(**given)
    found = getattr(found, "pooler_output", found)
    return torch.cat([x.flatten(0, -2) for x in found])


def by_tower(model, inputs):
    """(V, D) by calling the parts of the vision side."""
    base = model.model
    if hasattr(base, "visual"):
        found = base.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        return getattr(found, "pooler_output", found)
    states = base.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    return base.multi_modal_projector(states).flatten(0, 1)


HANDS = [
    ("llava", by_tower), ("qwen2_vl", by_tower), ("qwen2_vl", by_encoding), ("qwen2_5_vl", by_encoding),
    ("internvl", by_encoding), ("mistral3", by_encoding),
]  # fmt: skip


def images_alone(family, seed):
    """A model and a row with one image."""
    if family.startswith("qwen"):
        import tiny_qwen
        from families import Scene

        model, _ = make(family, which=(0,), seed=seed)
        rows = [tiny_qwen.prompt(family, 3, ("image", 3, 4), 5)]
        return model, Scene(tiny_qwen.batch(rows, model.dtype), tiny_qwen.visual(rows))
    return make(family, which=(0,), seed=seed)


@pytest.mark.parametrize(("family", "encode"), HANDS)
def test_features_merged_by_the_caller_are_announced_once(family, encode):
    model, scene = images_alone(family, seed=90)
    inputs = {name: x for name, x in scene.forward().items() if name in ("attention_mask", "position_ids")}
    ids = scene.inputs["input_ids"]

    @torch.no_grad()
    def by_hand():
        embeds = model.get_input_embeddings()(ids).clone()
        embeds[ids == model.config.image_token_id] = encode(model, scene.inputs).to(embeds.dtype)
        return model(inputs_embeds=embeds, **inputs).logits

    @torch.no_grad()
    def text_alone():
        return model(inputs_embeds=model.get_input_embeddings()(ids[:, -4:])).logits

    plain, text = by_hand(), text_alone()
    with lp_patch.applied(model, **OPTIONS), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(text_alone(), text)
        with pytest.warns(UserWarning, match=MERGED):
            assert torch.equal(by_hand(), plain)
        assert torch.equal(by_hand(), plain)
        assert torch.equal(text_alone(), text)


# ---------------------------------------------------------------------- what is read at the time of the call


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "qwen2_5_vl", "idefics3"])
def test_the_image_tokens_id_changes_under_the_patch(family):
    model, scene = make(family, seed=91)
    old, new = model.config.image_token_id, 59
    with lp_patch.applied(model, **OPTIONS) as patch:
        ids = scene.inputs["input_ids"]
        ids[ids == new] = 58
        ids[ids == old] = new
        model.config.image_token_id = new
        logits, sets = forward(model, scene), kept(patch)
        said = model.generate(
            **scene.inputs, max_new_tokens=2, do_sample=False, suppress_tokens=[*range(7), new], output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    want = scene.want(model, **OPTIONS)
    assert sets == [want.stage1, want.stage2]
    torch.testing.assert_close(logits[want.left], want.logits[want.left], **CLOSE)
    torch.testing.assert_close(said.logits[0], want.logits[:, -1], **CLOSE)


@pytest.mark.parametrize(
    "given",
    [{"vision_feature_select_strategy": "full"}, {"vision_feature_layer": -1}, {"vision_feature_layer": [-3]}],
    ids=str,
)
def test_llavas_feature_arguments_of_a_call(given):
    """Where [CLS] is read they must say what the config says; else they mean what they mean unpatched."""
    full = "vision_feature_select_strategy" in given
    model = tiny.tiny_llava(seed=92, kv_heads=2)
    ids = torch.tensor([[7, 8] + [tiny.IMAGE] * (tiny.N + full) + [9, 10, 11]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": tiny.images(1)}
    own = {name: getattr(model.config, name) for name in given}
    with torch.no_grad():
        for scorer in ("cls", "visionzip", "hiprune", "vispruner"):
            with lp_patch.applied(model, **OPTIONS, scorer=scorer):
                with pytest.raises(lp_patch.UnsupportedInputError, match=f"scorer='{scorer}' reads \\[CLS\\] where"):
                    model(**inputs, **given)
                with pytest.raises(lp_patch.UnsupportedInputError, match=f"scorer='{scorer}' reads \\[CLS\\] where"):
                    model.generate(**inputs, **given, max_new_tokens=1)
                if not full:
                    model(**inputs, **own)
        with lp_patch.applied(model, **OPTIONS) as patch:
            logits, sets = model(**inputs, **given).logits, kept(patch)
        for name, value in given.items():
            setattr(model.config, name, value)
        with lp_patch.applied(model, **OPTIONS) as patch:
            torch.testing.assert_close(model(**inputs).logits, logits, rtol=0, atol=0)
            assert kept(patch) == sets


@pytest.mark.parametrize("family", ["llava", "idefics3", "smolvlm"])
def test_a_stray_sliding_window_that_no_layer_reads(family):
    model, scene = make(family, seed=93, sliding_window=8)
    assert model.config.get_text_config().sliding_window == 8
    want = scene.want(model, **OPTIONS)
    with lp_patch.applied(model, **OPTIONS):
        logits = forward(model, scene, use_cache=False)
        torch.testing.assert_close(logits[want.left], want.logits[want.left], **CLOSE)
        if family != "llava":  # transformers makes them a cache that has such a window, which no mask knows of
            with pytest.raises(lp_patch.UnsupportedInputError, match=r"DynamicSlidingWindowLayer, .* no window"):
                forward(model, scene)
    with lp_patch.applied(model, ratio=1.0):
        forward(model, scene)


@pytest.mark.parametrize(
    ("family", "window"),
    [
        ("mistral3", {}),
        *[(x, {"use_sliding_window": True, "max_window_layers": 2}) for x in ("qwen2_vl", "qwen2_5_vl", "internvl")],
    ],
)
def test_a_sliding_window_that_layers_read(family, window):
    """It counts tokens that were removed, as the oracle does, which hides them."""
    model, scene = make(family, seed=94, sliding_window=8, **window)
    want = scene.want(model, **OPTIONS)
    plain, stray = make(family, seed=94, **window | ({"use_sliding_window": False} if window else {}))
    assert not torch.allclose(want.logits, stray.want(plain, **OPTIONS).logits, atol=0.1)
    with lp_patch.applied(model, **OPTIONS):
        for cached in (False, True):
            logits = forward(model, scene, use_cache=cached)
            torch.testing.assert_close(logits[want.left], want.logits[want.left], **CLOSE)


# ---------------------------------------------------------------------- values that features can have

SPOILED = {
    "llava": "multi_modal_projector", "llava_next": "multi_modal_projector", "qwen2_5_vl": "visual.merger",
    "internvl": "multi_modal_projector", "idefics3": "connector",
}  # fmt: skip


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("family", SPOILED)
def test_features_that_overflow(family, value):
    """Passed on bit for bit at full budget; and when pruning, such a feature is one like any other."""
    model, scene = make(family, torch.float32, which=(0,), seed=94)

    def spoil(module, args, output):
        output = output.clone()
        output.flatten(0, -2)[:2] = value
        return output

    module = model.base_model.get_submodule(SPOILED[family])
    with lp_patch.applied(model, **OPTIONS) as patch:
        forward(model, scene)
        sizes = [[len(x) for x in rows] for rows in kept(patch)]
    handle = module.register_forward_hook(spoil)
    plain = forward(model, scene)
    assert not plain.isfinite().all()
    with lp_patch.applied(model, ratio=1.0) as patch:
        torch.testing.assert_close(forward(model, scene), plain, rtol=0, atol=0, equal_nan=True)
    with lp_patch.applied(model, **OPTIONS) as patch:
        forward(model, scene)
        assert [[len(x) for x in rows] for rows in kept(patch)] == sizes
    handle.remove()


# ---------------------------------------------------------------------- pictures that the mask hides


def hide(scene, row, positions):
    scene.inputs["attention_mask"][row, positions] = 0
    hidden = set(positions)
    return [
        [[p for p in x if r != row or p not in hidden] for x in own] for r, own in enumerate(scene.visual)
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["one picture", "half of one"])
@pytest.mark.parametrize("family", ["llava", "internvl", "mistral3", "llava_next"])
def test_a_picture_that_the_mask_hides(family, part):
    model, scene = make(family, seed=95)
    whole, given, features = scene.visual, scene.forward()["position_ids"], scene.features(model)
    picture = scene.visual[1][1]
    if part == "one picture" and scene.structural:
        picture = list(range(picture[0], picture[-1] + 2))  # its line breaks too
    visible = hide(scene, 1, picture if part == "one picture" else picture[: len(picture) // 2])
    plain = forward(model, scene, position_ids=given)
    with lp_patch.applied(model, ratio=1.0):
        assert torch.equal(forward(model, scene, position_ids=given), plain)
    forward_of = scene.forward
    scene.forward = lambda new=None: {**forward_of(new), "position_ids": given}
    # a family that chooses in its encoder chooses before anybody knows of the mask
    scene.visual = whole if family == "llava" and part != "one picture" else [[x for x in own if x] for own in visible]
    if features is not None and part == "one picture":
        del features[1][1]
    want = scene.want(model, **OPTIONS, **({} if features is None else {"features": features}))
    with lp_patch.applied(model, **OPTIONS) as patch:
        logits = forward(model, scene)
    torch.testing.assert_close(logits[want.left], want.logits[want.left], **CLOSE)
    assert not torch.allclose(logits[want.left], plain[want.left], atol=1e-2)
    if family != "llava":
        assert kept(patch) == [want.stage1, want.stage2]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "video_llava"])
def test_a_hidden_picture_at_full_budget(family):
    model, scene = make(family, torch.float32, seed=96)
    position_ids = {} if family.startswith("qwen") else {"position_ids": scene.forward()["position_ids"]}
    hidden = [scene.visual[1][1], scene.visual[1][0][: len(scene.visual[1][0]) // 2]]
    for positions in hidden[: 1 if family.startswith("qwen") else 2]:  # Qwen's count positions picture by picture
        hide(scene, 1, positions)
        plain = forward(model, scene, **position_ids)
        with lp_patch.applied(model, ratio=1.0):
            assert torch.equal(forward(model, scene, **position_ids), plain)


@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_inputs_embeds_at_full_budget(family):
    model, scene = make(family, torch.float32, which=(0,), seed=97)
    inputs = scene.forward()
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with torch.no_grad():
        plain = model(**inputs).logits
        with lp_patch.applied(model, ratio=1.0):
            assert torch.equal(model(**inputs).logits, plain)
        with lp_patch.applied(model, **OPTIONS), pytest.raises(lp_patch.UnsupportedInputError, match="give input_ids"):
            model(**inputs)


# ---------------------------------------------------------------------- what is handed out


def tensors(value):
    """All tensors in an output, a cache's keys and values left out."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for name, x in value.items():
            if name != CACHE:
                yield from tensors(x)
    elif isinstance(value, (tuple, list)):
        for x in value:
            yield from tensors(x)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl", "mistral3"])
@pytest.mark.parametrize("part", ["base", "whole"])
def test_tuples_hold_what_the_dict_holds(family, part):
    model, scene = make(family, torch.float32, seed=98)
    inputs = {**scene.forward(), "output_hidden_states": True}
    run = model.base_model if part == "base" else model
    with lp_patch.applied(model, **OPTIONS), torch.no_grad():
        named, plain = run(**inputs), run(**inputs, return_dict=False)
        assert isinstance(plain, tuple)
        found = [list(tensors(x)) for x in (dict(named), plain)]
        assert len(found[0]) == len(found[1]) > 7
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
            assert not x.isnan().any()
