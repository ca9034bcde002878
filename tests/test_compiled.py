"""`apply(compile=True)`: what is replayed equals what runs as it comes, and nothing in a region waits for the device.

Without a GPU a region runs as it is, in its fixed buffers: all but the capture itself.
"""

import copy
import pickle
import warnings

import pytest
import torch
from counting import Counted
from families import FAMILIES, make
from tiny import CACHE, N, batch, images, tiny_llava, tokens

import lp_patch
from lp_patch import graphs, regions

CPU = "ignore:compile=True captures CUDA graphs:UserWarning"
pytestmark = pytest.mark.filterwarnings(CPU)


@torch.no_grad()
def answers(model, inputs, **options):
    mute = {0, *(getattr(model.config, f"{name}_token_id", 0) for name in ("image", "video"))}
    out = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True,
        suppress_tokens=sorted(mute), **options,
    )  # fmt: skip
    return torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", [x for x in FAMILIES if x != "llava_llama"])
def test_equals_what_runs_without(family, cache):
    model, scene = make(family, torch.float64, (0,), seed=17)
    more = {} if cache == "dynamic" else {"cache_implementation": "static"}
    with lp_patch.applied(model, tokens=4) as patch:
        want, trace = answers(model, scene.inputs, **more), patch.trace
    with warnings.catch_warnings(record=True) as caught, lp_patch.applied(model, tokens=4, compile=True) as patch:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(answers(model, scene.inputs, **more), want)
        found, engine = patch.trace, patch._engine
    for stage in ("stage1", "stage2", "stage2_scores"):
        assert [x.tolist() for x in getattr(found, stage)] == [
            pytest.approx(x.tolist(), rel=1e-4) for x in getattr(trace, stage)
        ]
    said = [str(x.message) for x in caught if "is not captured" in str(x.message)]
    assert not said and len(engine.languages.kept) == 1
    assert "forward" not in vars(model.model.language_model if hasattr(model.model, "language_model") else model)


def prompts(lengths, seed=0):
    return [batch([tokens(3, "image", n, seed=n)], images(1, seed=n + seed)) for n in lengths]


@torch.no_grad()
def test_prompts_of_about_the_same_length_share_a_region():
    model = tiny_llava(seed=3)
    shown = prompts([4, 7, 9, 30])
    with lp_patch.applied(model, tokens=5):
        want = [model(**x).logits for x in shown]
    with lp_patch.applied(model, tokens=5, compile=True) as patch:
        for _ in range(2):
            for inputs, logits in zip(shown, want, strict=True):
                out = model(**inputs)
                torch.testing.assert_close(out.logits, logits)
                assert out[CACHE].get_seq_length() == inputs["input_ids"].shape[1]
        assert len(patch._engine.languages.kept) == 2 and len(patch._engine.encoders.kept) == 1


def shown(out):
    """The first image's features, as an output shows them."""
    return out.image_outputs.pooler_output[0] if hasattr(out, "image_outputs") else out.image_hidden_states[0]


@torch.no_grad()
def test_a_region_keeps_nothing_of_the_call_before():
    """Outputs, features, traces and caches of one call are not written by the next."""
    model = tiny_llava(seed=4)
    one, other = prompts([5, 5], seed=9)[0], batch([tokens(3, "image", 5, seed=8)], images(1, seed=8))
    with lp_patch.applied(model, tokens=5, compile=True) as patch:
        out = model(**one)
        kept = [out.logits.clone(), out[CACHE].layers[4].keys.clone(), shown(out).clone()]
        trace = patch.trace
        stages = [x.clone() for x in (*trace.stage1, *trace.stage2, *trace.stage2_scores)]
        features = model.get_image_features(one["pixel_values"], return_dict=True).pooler_output[0]
        before = features.clone()
        model(**other)
        assert torch.equal(features.nan_to_num(), before.nan_to_num())
    now = [out.logits, out[CACHE].layers[4].keys, shown(out)]
    assert all(map(torch.equal, now, kept))
    assert all(map(torch.equal, (*trace.stage1, *trace.stage2, *trace.stage2_scores), stages))


@torch.no_grad()
def test_no_wait_inside_a_region(monkeypatch):
    """A wait for the device, or a shape that depends on its numbers, cannot be captured."""
    model, waits = tiny_llava(seed=5), []
    replay = regions.Region.replay

    def counted(self, values):
        with Counted() as seen:
            result = replay(self, values)
        waits.append(seen.waits + seen.ops["aten::masked_select"] + seen.ops["aten::is_nonzero"])
        return result

    monkeypatch.setattr(regions.Region, "replay", counted)
    for options in ({}, {"scorer": "cls"}, {"stage_ratio": 1.0}, {"final_wipe_layer": 5}, {"scorer": "uniform"}):
        with lp_patch.applied(model, tokens=5, compile=True, **options):
            model(**prompts([6])[0])
    assert waits == [0] * 10


@torch.no_grad()
@pytest.mark.parametrize(
    "call, why",
    [
        (lambda m: m(**batch([tokens(3, "image", 4), tokens(2, "image", 6)], images(2))), "a batch of several rows"),
        (lambda m: m(**prompts([5])[0], output_hidden_states=True), "output_hidden_states"),
        (lambda m: m.set_attn_implementation("eager") or m(**prompts([5])[0]), "attn_implementation='eager'"),
    ],
    ids=["batch", "hidden states", "eager"],
)
def test_what_does_not_fit_runs_as_without_and_says_so_once(call, why):
    model = tiny_llava(seed=6, dtype=torch.float32)
    with lp_patch.applied(copy.deepcopy(model), tokens=5) as patch:
        want = call(patch._parts.model).logits
    with warnings.catch_warnings(record=True) as caught, lp_patch.applied(model, tokens=5, compile=True):
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(call(model).logits, want)
    said = [str(x.message) for x in caught if "is not captured" in str(x.message)]
    assert len(said) == 1 and why in said[0]


def test_gradients_run_as_without():
    model = tiny_llava(seed=7)
    with pytest.warns(UserWarning, match="gradients is not captured"), lp_patch.applied(model, tokens=5, compile=True):
        model(**prompts([5])[0]).logits.sum().backward()
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_full_budget_and_text_are_untouched():
    model = tiny_llava(seed=8, dtype=torch.float32)
    text, shown = batch([tokens(9)], None), prompts([5])[0]
    shown["pixel_values"] = shown["pixel_values"].float()
    want = model(**text).logits, model(**shown).logits
    with lp_patch.applied(model, tokens=N, compile=True) as patch:
        assert torch.equal(model(**text).logits, want[0]) and torch.equal(model(**shown).logits, want[1])
        assert not patch._engine.languages.kept


@torch.no_grad()
def test_a_capture_ends_with_the_weights_it_was_made_of():
    """New weights, a module in another's place, or a hook of somebody else: captured anew."""
    model = tiny_llava(seed=9)
    inputs, layer = prompts([5])[0], model.model.language_model.layers[3]
    with lp_patch.applied(model, tokens=5, compile=True) as patch:
        model(**inputs)
        regions = patch._engine.languages
        for change in (
            lambda: setattr(layer.mlp, "up_proj", copy.deepcopy(layer.mlp.up_proj)),
            lambda: setattr(layer.mlp.down_proj.weight, "data", layer.mlp.down_proj.weight.data.clone()),
            lambda: layer.mlp.register_forward_hook(lambda module, args, output: output * 2),
        ):
            (region,) = regions.kept.values()
            assert not region.stale
            change()
            assert region.stale
            out = model(**inputs).logits
            assert next(iter(regions.kept.values())) is not region
    with lp_patch.applied(model, tokens=5):
        torch.testing.assert_close(model(**inputs).logits, out)


@torch.no_grad()
def test_regions_are_bounded_and_the_unused_one_goes():
    model = tiny_llava(seed=10)
    with lp_patch.applied(model, tokens=5, compile=True) as patch:
        for n in range(regions.MOST + 3):
            model(**prompts([4 + graphs.BUCKET * n])[0])
        assert len(patch._engine.languages.kept) == regions.MOST


@torch.no_grad()
def test_copies_and_removal():
    model = tiny_llava(seed=11)
    inputs = prompts([5])[0]
    plain = model(**inputs).logits
    fresh = tiny_llava(seed=11)  # after a run transformers' own hooks do not pickle
    lp_patch.apply(fresh, tokens=5, compile=True)
    patch = lp_patch.apply(model, tokens=5, compile=True)
    want = model(**inputs).logits
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(fresh))]
    patch.remove()
    assert torch.equal(model(**inputs).logits, plain)
    for twin in twins:
        assert torch.equal(twin(**inputs).logits, want)
        assert twin.model.language_model.forward.__self__.parts.language_model is twin.model.language_model
        lp_patch.remove(twin)
        assert torch.equal(twin(**inputs).logits, plain)


def asked(keys):
    """Which of these shapes, in order, are captured anew (c), replayed (r) or run as they come (-)."""
    kept, made = regions.Regions(), []

    class Made:
        stale, used = False, 0

        def __init__(self):
            made.append(self)

    found = ""
    for key in keys:
        before = len(made)
        region = kept.get(key, Made)
        found += "-" if region is None else "c" if len(made) > before else "r"
        assert len(kept.kept) <= regions.MOST
    return found


def test_shapes_that_never_come_again_push_none_out():
    many = range(regions.MOST)
    full = "c" * len(many)
    assert asked([*many, *many]) == full + "r" * len(many)
    assert asked([*many, *range(100, 150), *many]) == full + "-" * 50 + "r" * len(many)
    # the second time since the shape in whose place it comes was used
    assert asked([*many, 100, 100, 100]) == full + "-cr"
    assert asked([*many, 100, 1, 100]) == full + "-rc"
    assert asked([*many, 100, 0, 100, 0]) == full + "-rcr"
    # more shapes in turn than there are places: most are replayed, none is captured again
    cycle = [*many, 100, 101]
    assert asked(cycle * 4) == full + "--" + ("r" * len(many) + "--") * 3


def test_a_model_that_cannot_be_captured_is_left_alone():
    kept, tried = regions.Regions(), []

    def fails():
        tried.append(1)
        raise RuntimeError("no")

    for key in [*range(30)] * 2:
        try:
            assert kept.get(key, fails) is None
        except RuntimeError:
            kept.refuse(key)
    assert len(tried) == regions.MOST and not kept.kept


@torch.no_grad()
def test_an_error_of_the_model_is_raised():
    """Raised while a region is made, and again without one: not swallowed."""
    model = tiny_llava(seed=12)
    inputs = prompts([5])[0]

    def broken(*args):
        raise LookupError("of the model's own")

    with lp_patch.applied(model, tokens=5, compile=True) as patch:
        handle = model.model.language_model.layers[2].mlp.register_forward_pre_hook(broken)
        with pytest.warns(UserWarning, match="own.*is not captured"), pytest.raises(LookupError, match="own"):
            model(**inputs)
        handle.remove()
        out = model(**inputs).logits
        assert not patch._engine.languages.kept
    with lp_patch.applied(model, tokens=5):
        assert torch.equal(model(**inputs).logits, out)
