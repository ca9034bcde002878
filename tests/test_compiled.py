"""`apply(compile=True)` on a pretended GPU: steps after replays, what is kept of a call, and when a capture ends."""

import copy
import pickle
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from devices import SECOND, put
from families import FAMILIES, make
from peft import LNTuningConfig, LoraConfig, get_peft_model
from pretended_gpu import ASKED, made, on_gpu, pretended_gpu
from tiny import CACHE, WIDTH, N, batch, images, tokens
from tiny import tiny_llava as on_cpu
from transformers.cache_utils import DynamicCache, DynamicLayer

import lp_patch
from lp_patch import graphs, regions


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    with pretended_gpu(monkeypatch) as found:
        yield found


def tiny_llava(**more):
    return made(on_cpu, **more)


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
    model, scene = made(make, family, torch.float64, (0,), seed=17)
    if family == "qwen3_vl_moe":
        model.set_experts_implementation("batched_mm")  # the loop over experts asks which of them anybody wants
    inputs = on_gpu(scene.inputs)
    more = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    with lp_patch.applied(model, tokens=4) as patch:
        want, trace = answers(model, inputs, **more), patch.trace
    with warnings.catch_warnings(record=True) as caught, lp_patch.applied(model, tokens=4, compile=True) as patch:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(answers(model, inputs, **more), want)
        found, layers = patch.trace, len(patch._engine.languages.kept)
    for stage in ("stage1", "stage2", "stage2_scores"):
        assert [x.tolist() for x in getattr(found, stage)] == [
            pytest.approx(x.tolist(), rel=1e-4) for x in getattr(trace, stage)
        ]
    said = [str(x.message) for x in caught if "is not captured" in str(x.message)]
    assert not said and layers == 1 and not patch.captured["regions"]
    assert "forward" not in vars(model.model.language_model if hasattr(model.model, "language_model") else model)


def prompts(lengths, seed=0):
    return [on_gpu(batch([tokens(3, "image", n, seed=n)], images(1, seed=n + seed))) for n in lengths]


@pytest.mark.parametrize(
    "scorer, text_scorer",
    [
        *((x, "text") for x in ("diversity", "cls", "vispruner", "visionzip", "hiprune", "random", "uniform")),
        *((x, "text") for x in ("learned", "covering")),
        ("diversity", "last"),
        ("none", "fastv"),
    ],
)
@torch.no_grad()
def test_every_strategy(scorer, text_scorer):
    model, options = (
        tiny_llava(seed=21),
        {"tokens": 5 + 8 * (scorer == "none"), "scorer": scorer, "text_scorer": text_scorer},
    )
    if scorer in ("learned", "covering"):
        options["pruner"] = made(lambda: lp_patch.LearnablePruner(WIDTH).double())
    shown, want = prompts([5, 9]), []
    with lp_patch.applied(model, **options) as patch:
        for x in shown:
            want.append((model(**x).logits, [*patch.trace.stage1, *patch.trace.stage2]))
    with lp_patch.applied(model, compile=True, **options) as patch:
        for _ in range(2):
            for x, (logits, kept) in zip(shown, want, strict=True):
                torch.testing.assert_close(model(**x).logits, logits)
                assert all(map(torch.equal, (*patch.trace.stage1, *patch.trace.stage2), kept))
        assert patch.captured["regions"] == 2


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
    one, other = prompts([5, 5], seed=9)[0], on_gpu(batch([tokens(3, "image", 5, seed=8)], images(1, seed=8)))
    with lp_patch.applied(model, tokens=5, compile=True) as patch:
        out = model(**one)
        kept = [out.logits.clone(), out[CACHE].layers[4].keys.clone(), shown(out).clone()]
        trace = patch.trace
        stages = [x.clone() for x in (*trace.stage1, *trace.stage2, *trace.stage2_scores)]
        features = model.get_image_features(one["pixel_values"], return_dict=True).pooler_output[0]
        before = features.clone()
        model.get_image_features(other["pixel_values"], return_dict=True)
        model(**other)
        assert torch.equal(features.nan_to_num(), before.nan_to_num())
    now = [out.logits, out[CACHE].layers[4].keys, shown(out)]
    assert all(map(torch.equal, now, kept))
    assert all(map(torch.equal, (*trace.stage1, *trace.stage2, *trace.stage2_scores), stages))


@torch.no_grad()
def test_a_replayed_prefill_waits_once(gpu):
    """For the plan; beside it, transformers asks whether there are as many features as placeholders."""
    model = tiny_llava(seed=5)
    for options in ({}, {"scorer": "cls"}, {"stage_ratio": 1.0}, {"final_wipe_layer": 5}, {"scorer": "uniform"}):
        with lp_patch.applied(model, tokens=5, compile=True, **options) as patch:
            model(**prompts([6])[0])
            inputs = prompts([7])[0]
            gpu.waits.clear()
            model(**inputs)
            assert patch.captured["regions"] == 2
        assert sorted(x for x in gpu.waits if x in ASKED) == ["cpu", "item"]


def two():
    return on_gpu(batch([tokens(3, "image", 4), tokens(2, "image", 6)], images(2)))


@torch.no_grad()
@pytest.mark.parametrize(
    "call, why",
    [
        (lambda m: m(**two()), "a batch of several rows"),
        (lambda m: m(**prompts([5])[0], output_hidden_states=True), "output_hidden_states"),
        (lambda m: m.set_attn_implementation("eager") or m(**prompts([5])[0]), "attn_implementation='eager'"),
    ],
    ids=["batch", "hidden states", "eager"],
)
def test_what_does_not_fit_runs_as_without_and_says_so_once(call, why):
    model = tiny_llava(seed=6, dtype=torch.float32)
    with lp_patch.applied(made(copy.deepcopy, model), tokens=5) as patch:
        want = call(patch._parts.model).logits
    with warnings.catch_warnings(record=True) as caught, lp_patch.applied(model, tokens=5, compile=True):
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(call(model).logits, want)
    said = [str(x.message) for x in caught if "is not captured" in str(x.message)]
    assert len(said) == 1 and why in said[0]


class Odd(DynamicLayer):
    """As a quantised layer is: of a dynamic cache, and keeping its keys in a way of its own."""


@torch.no_grad()
def test_caches_of_other_kinds_are_not_captured(monkeypatch):
    model, inputs, asked = tiny_llava(seed=26), prompts([5])[0], []
    decide = graphs.why_not
    monkeypatch.setattr(graphs, "why_not", lambda *given: asked.append(given) or decide(*given))
    cache = DynamicCache()
    cache.layers = [Odd() for _ in range(6)]
    with lp_patch.applied(model, tokens=5, compile=True) as patch:
        with pytest.warns(UserWarning, match="a cache of Odd is not captured"):
            out = model(**inputs, **{CACHE: cache}).logits
        assert not patch._engine.languages.kept
        torch.testing.assert_close(model(**inputs).logits, out)
    offloaded = DynamicCache()
    offloaded.offloading = True  # a real one wants streams, which the pretended GPU lacks
    *others, _ = asked[-1]
    assert decide(*others, DynamicCache()) is None and decide(*others, offloaded) == "an offloaded cache"


def test_gradients_run_as_without():
    model = tiny_llava(seed=7)
    with pytest.warns(UserWarning, match="gradients is not captured"), lp_patch.applied(model, tokens=5, compile=True):
        model(**prompts([5])[0]).logits.sum().backward()
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_full_budget_and_text_are_untouched():
    model = tiny_llava(seed=8, dtype=torch.float32)
    text, shown = on_gpu(batch([tokens(9)], None)), prompts([5])[0]
    shown["pixel_values"] = shown["pixel_values"].float()
    want = model(**text).logits, model(**shown).logits
    with lp_patch.applied(model, tokens=N, compile=True) as patch:
        assert torch.equal(model(**text).logits, want[0]) and torch.equal(model(**shown).logits, want[1])
        assert not patch._engine.languages.kept


def narrow(mlp):
    """Half of its rows, in the same memory."""
    for x in (mlp.up_proj, mlp.gate_proj):
        x.weight.data = x.weight.data[: len(x.weight) // 2]
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, : mlp.down_proj.weight.shape[1] // 2]


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
def test_a_capture_ends_with_the_weights_it_was_made_of():
    """New weights, another module or its forward in one's place: captured anew."""
    model = tiny_llava(seed=9)
    inputs, layer = prompts([5])[0], model.model.language_model.layers[3]
    with lp_patch.applied(model, tokens=5, compile=True) as patch:
        model(**inputs)
        assert patch.captured["regions"] == 2
        regions = patch._engine.languages
        for change in (
            lambda: setattr(layer.mlp, "up_proj", made(copy.deepcopy, layer.mlp.up_proj)),
            lambda: setattr(layer.mlp.down_proj.weight, "data", layer.mlp.down_proj.weight.data.clone()),
            lambda: setattr(layer.mlp, "forward", lambda x, own=layer.mlp.forward: 2 * own(x)),
            lambda: narrow(layer.mlp),
            lambda: setattr(layer.input_layernorm, "variance_epsilon", 0.5),
            lambda: setattr(layer.self_attn.q_proj, "__class__", Doubled),
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
    twins = made(lambda: [copy.deepcopy(model), pickle.loads(pickle.dumps(fresh))])
    patch.remove()
    assert torch.equal(model(**inputs).logits, plain)
    for twin in twins:
        assert torch.equal(twin(**inputs).logits, want)
        assert twin.model.language_model.forward.func.__self__.parts.language_model is twin.model.language_model
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
        layer = model.model.language_model.layers[2]
        layer.mlp.forward = broken
        with pytest.warns(UserWarning, match="own.*is not captured"), pytest.raises(LookupError, match="own"):
            model(**inputs)
        del layer.mlp.forward
        out = model(**inputs).logits
        assert not patch._engine.languages.kept
    with lp_patch.applied(model, tokens=5):
        assert torch.equal(model(**inputs).logits, out)


def changes():
    """name -> what a user does between two calls, undone at the end: a context for a model."""

    @contextmanager
    def under(context):
        with context:
            yield

    @contextmanager
    def training(model):
        model.model.language_model.train()
        yield
        model.eval()

    @contextmanager
    def attention(model):
        model.model.vision_tower.set_attn_implementation("eager")
        yield
        model.model.vision_tower.set_attn_implementation("sdpa")

    @contextmanager
    def buffer(model):
        rotary = model.model.language_model.rotary_emb
        before = rotary.inv_freq
        rotary.register_buffer("inv_freq", before * 0.5, persistent=False)
        yield
        rotary.register_buffer("inv_freq", before, persistent=False)

    @contextmanager
    def config(model):
        model.config.vision_feature_layer = -1
        yield
        model.config.vision_feature_layer = -2

    return {
        "inference mode": lambda model: under(torch.inference_mode()),
        "training": training,
        "attention of the tower": attention,
        "a config": config,
        "a buffer": buffer,
    }


@pytest.mark.parametrize("name", changes())
@pytest.mark.parametrize("first", [False, True])
@torch.no_grad()
def test_what_is_set_between_calls_holds(name, first):
    """Whichever way it was when the shape was captured."""
    model = tiny_llava(seed=13, dtype=torch.float32, attention_dropout=0.0)
    inputs = prompts([5])[0]
    inputs["pixel_values"] = inputs["pixel_values"].float()
    want, found = {}, {}
    for captured, into in ((False, want), (True, found)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch = lp_patch.apply(model, tokens=5, compile=captured)
            for on in (first, not first, first, not first):
                with changes()[name](model) if on else nullcontext():
                    into.setdefault(on, []).append(model(**inputs).logits)
            regions = patch.captured["regions"]
        assert regions == captured * (4 if "attention" in name else 2)
        patch.remove()
    for on in (False, True):
        for logits in found[on]:
            torch.testing.assert_close(logits, want[on][0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_adapters_that_are_switched_off_or_merged():
    model = tiny_llava(seed=14)
    config = LoraConfig(target_modules=r".*language_model.*(q_proj|up_proj)", init_lora_weights=False)

    def with_two():
        wrapped = get_peft_model(model, config)
        wrapped.add_adapter("other", config)
        return wrapped

    wrapped, inputs = made(with_two), prompts([5])[0]
    steps = [
        lambda: wrapped.set_adapter("other"),
        lambda: wrapped.base_model.disable_adapter_layers(),
        lambda: wrapped.base_model.enable_adapter_layers(),
        lambda: made(wrapped.merge_adapter),
        lambda: made(wrapped.unmerge_adapter),
        lambda: wrapped.set_adapter("default"),
    ]
    found = []
    for captured in (False, True):
        with lp_patch.applied(wrapped, tokens=5, compile=captured) as patch:
            found.append([wrapped(**inputs).logits])
            for step in steps:
                step()
                found[-1].append(wrapped(**inputs).logits)
            assert patch.captured["regions"] == 2 * captured
    for want, logits in zip(*found, strict=True):
        torch.testing.assert_close(logits, want)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # Llama's norm, says PEFT
@torch.no_grad()
def test_adapters_switched_off_by_what_hides_their_class_s():
    model = tiny_llava(seed=23)
    wrapped = made(get_peft_model, model, LNTuningConfig(target_modules=r".*language_model.*input_layernorm"))
    for name, x in wrapped.named_parameters():
        if "ln_tuning" in name:
            x.mul_(3)
    inputs, found = prompts([5])[0], []
    for captured in (False, True):
        with lp_patch.applied(wrapped, tokens=5, compile=captured):
            found.append([wrapped(**inputs).logits])
            with wrapped.disable_adapter():
                found[-1].append(wrapped(**inputs).logits)
            found[-1].append(wrapped(**inputs).logits)
    for want, logits in zip(*found, strict=True):
        torch.testing.assert_close(logits, want)
    assert not torch.allclose(found[0][0], found[0][1])


@torch.no_grad()
def test_a_copy_of_the_layers_alone_has_its_own_weights():
    model = tiny_llava(seed=24)
    with lp_patch.applied(model, tokens=5, compile=True):
        model(**prompts([5])[0])
        alone = made(copy.deepcopy, model.model.language_model)
        for x in alone.parameters():
            x.zero_()
        ids = on_gpu({"input_ids": torch.tensor([[5, 6, 7]])})
        assert not alone(**ids).last_hidden_state.any()


def test_removal_leaves_what_others_put_there_since():
    model = tiny_llava(seed=25)
    module = model.model.language_model
    for theirs in (lambda *args, **kwargs: "theirs", None):
        patch = lp_patch.apply(model, tokens=5, compile=True)
        if theirs is None:
            del module.forward
        else:
            module.forward = theirs
        patch.remove()
        assert vars(module).pop("forward", None) is theirs and not lp_patch.is_applied(model)


@torch.no_grad()
def test_another_pruner_chooses_anew():
    model = tiny_llava(seed=15)
    pruner, inputs = made(lp_patch.LearnablePruner, WIDTH), prompts([5])[0]
    pruner.double()
    made(lambda: [pruner])
    with lp_patch.applied(model, tokens=5, pruner=pruner, compile=True) as patch:
        model(**inputs)
        before = patch.trace.stage1[0].tolist()
        for x in pruner.parameters():
            x.data = -x.data
        out = model(**inputs).logits
        assert patch.trace.stage1[0].tolist() != before
    with lp_patch.applied(model, tokens=5, pruner=pruner):
        torch.testing.assert_close(model(**inputs).logits, out)


@torch.no_grad()
def test_reports_and_random_numbers_are_those_of_a_run_without():
    model, inputs = tiny_llava(seed=16), prompts([5])[0]
    reports, drawn = [], []
    for captured in (False, True):
        with lp_patch.applied(model, tokens=5, compile=captured) as patch:
            torch.manual_seed(3)
            for _ in range(2):
                model(**inputs)
                drawn.append(torch.rand(2).tolist())
                reports.append(str(patch.report()))
    assert len(set(reports)) == 1 and drawn[:2] == drawn[2:]


@torch.no_grad()
def test_nothing_is_captured_under_autocast():
    """Its copies of weights last as long as it does."""
    model, inputs = tiny_llava(seed=22), prompts([5])[0]
    with lp_patch.applied(model, tokens=5, compile=True) as patch:
        torch.set_autocast_enabled("cuda", True)  # tensors that only pretend to be there are left as they are
        try:
            with pytest.warns(UserWarning, match="under autocast") as caught:
                want = model(**inputs).logits
        finally:
            torch.set_autocast_enabled("cuda", False)
        assert len(caught) == 2 and not patch.captured["regions"]
        torch.testing.assert_close(model(**inputs).logits, want)
        assert patch.captured["regions"] == 2


@torch.no_grad()
def test_hooks_of_others_are_called():
    model, inputs, seen = tiny_llava(seed=17), prompts([5])[0], []
    with lp_patch.applied(model, tokens=5, compile=True) as patch:
        want = model(**inputs).logits
        with pytest.warns(UserWarning, match="hooks of others.*not captured"):
            hook = model.model.language_model.layers[1].register_forward_hook(lambda *args: seen.append(1))
            tower = model.model.vision_tower.register_forward_pre_hook(lambda *args: seen.append(2))
            for _ in range(2):
                torch.testing.assert_close(model(**inputs).logits, want)
        assert sorted(seen) == [1, 1, 2, 2] and not patch.captured["regions"]
        hook.remove(), tower.remove()
        torch.testing.assert_close(model(**inputs).logits, want)
        assert patch.captured["regions"] == 2


@torch.no_grad()
def test_a_rotary_embedding_that_grows_is_not_captured():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_llava(seed=19, rope_parameters=rope, max_position_embeddings=N + 20)
    shown = prompts([4, 24])
    with lp_patch.applied(model, tokens=5):
        want = [model(**x).logits for x in shown]
    model = tiny_llava(seed=19, rope_parameters=rope, max_position_embeddings=N + 20)
    told = pytest.warns(UserWarning, match="rotary embedding that changes with the length")
    with told, lp_patch.applied(model, tokens=5, compile=True):
        for x, logits in zip(shown, want, strict=True):
            torch.testing.assert_close(model(**x).logits, logits)


def test_a_model_on_several_devices_is_refused():
    model = tiny_llava(seed=20)
    put(model.model.language_model.layers[0].mlp.up_proj.weight, SECOND)
    with pytest.raises(lp_patch.UnsupportedModelError, match="on one device, this model lies on cuda:0, cuda:1"):
        lp_patch.apply(model, tokens=5, compile=True)
    assert not lp_patch.is_applied(model)
