"""Install, remove, replace, copy: what a patch touches, and that nothing of it stays."""

import copy
import gc
import inspect
import io
import pickle
import weakref
from functools import partial

import pytest
import torch
from oracle import generated
from test_forward import make_pruner
from tiny import CACHE, WIDTH, batch, images, tiny_llava, tokens

import lp_patch
from lp_patch.install import Installation, forget_compiled

OPTIONS = [{}, {"scorer": "cls", "tokens": 5}, {"stage_ratio": 1.0}, {"scorer": "learned", "final_wipe_layer": 4}]


def snapshot(model):
    """All that a leftover could hide in: for each module its attributes and hooks, configs, weights, signatures."""
    picture = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            where = f"{name}.{key}"
            if isinstance(value, dict):
                picture[where] = [(k, id(v)) for k, v in value.items()]
            elif key == "config":
                picture[where] = (id(value), type(value), value.to_dict(), dict(vars(value)).keys())
            else:
                picture[where] = (id(value), type(value))
        picture[f"{name} class"] = type(module)
        picture[f"{name} forward"] = str(inspect.signature(module.forward))
    picture["state"] = {key: (id(value), value.sum().item()) for key, value in model.state_dict(keep_vars=True).items()}
    picture["encode"] = str(inspect.signature(getattr(model.base_model, "get_image_features", model.forward)))
    return picture


def inputs_for(model, seed=0):
    dtype = next(model.parameters()).dtype
    return batch([tokens(3, "image", 9, seed=seed)], images(1, seed=seed, dtype=dtype))


def answer(model, seed=0):
    return model.generate(**inputs_for(model, seed), max_new_tokens=4, do_sample=False)[0, -4:].tolist()


def logits(model, seed=0):
    with torch.no_grad():
        return model(**inputs_for(model, seed)).logits


def apply(model, options):
    return lp_patch.apply(model, pruner=make_pruner() if options.get("scorer") == "learned" else None, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ran", [False, True], ids=["never run", "run"])
def test_nothing_is_left_behind(options, ran):
    model = tiny_llava(dtype=torch.float32)
    want = logits(model)  # transformers installs its own capturing hooks at the first forward
    before = snapshot(model)
    patch = apply(model, options)
    assert snapshot(model) != before
    assert snapshot(model)["state"] == before["state"], "weights or their names changed"
    assert snapshot(model)["encode"] == before["encode"], "generate() reads this signature"
    if ran:
        answer(model)
    patch.remove()
    assert snapshot(model) == before
    assert torch.equal(logits(model), want)
    patch.remove()
    lp_patch.remove(model)
    assert snapshot(model) == before


def test_a_removed_patch_does_not_keep_the_model_alive():
    model = tiny_llava()
    with lp_patch.applied(model, tokens=5):
        answer(model)
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None


def test_forty_rounds_leave_it_as_new():
    model = tiny_llava(dtype=torch.float32)
    want = logits(model)
    before = snapshot(model)
    for i in range(40):
        patch = apply(model, OPTIONS[i % len(OPTIONS)])
        if i % 8 == 0:
            answer(model)
        (patch.remove if i % 2 else lambda: lp_patch.remove(model))()
    assert snapshot(model) == before
    assert torch.equal(logits(model), want)


def test_an_error_while_installing_leaves_nothing(monkeypatch):
    model = tiny_llava()
    logits(model)
    before = snapshot(model)
    for wrong, error in [
        ({"tokens": 0}, lp_patch.ConfigError),
        ({"token": 64}, lp_patch.ConfigError),
        ({"layer": 6}, lp_patch.ConfigError),
        ({"layer": 3, "final_wipe_layer": 3}, lp_patch.ConfigError),
        ({"final_wipe_layer": 7}, lp_patch.ConfigError),
        ({"scorer": "learned"}, lp_patch.ConfigError),
        ({"scorer": "best"}, lp_patch.ConfigError),
        ({"text_scorer": "best"}, lp_patch.ConfigError),
        ({"pruner": lp_patch.LearnablePruner(WIDTH + 1)}, lp_patch.PrunerError),
        ({"pruner": 7}, lp_patch.PrunerError),
        ({"pruner": make_pruner(), "scorer": "cls"}, lp_patch.ConfigError),
        ({"config": {"token": 5}}, lp_patch.ConfigError),
        ({"scorer": "none", "tokens": 12}, lp_patch.ConfigError),  # two of six layers on 36 tokens
    ]:
        with pytest.raises(error):
            lp_patch.apply(model, **wrong)
        assert snapshot(model) == before, wrong

    def fail(*_):
        raise RuntimeError("as if")

    monkeypatch.setattr("lp_patch.engine.install_tap", fail)
    with pytest.raises(RuntimeError):
        lp_patch.apply(model)
    assert snapshot(model) == before


def test_a_failed_apply_keeps_the_patch_that_was_there():
    model = tiny_llava()
    patch = lp_patch.apply(model, tokens=5)
    with pytest.raises(lp_patch.ConfigError):
        lp_patch.apply(model, tokens=-1)
    assert lp_patch.is_applied(model) and patch.active
    assert answer(model) == generated(model, tokens(3, "image", 9), images(1), 4, tokens=5)


def test_a_dict_of_options_patches_like_the_options():
    model = tiny_llava()
    with lp_patch.applied(model, tokens=5, scorer="cls") as patch:
        want, config = answer(model), patch.config
    assert lp_patch.apply(model, {"tokens": 5, "scorer": "cls"}).config == config
    assert answer(model) == want
    with lp_patch.applied(model, {"tokens": 9}, tokens=5, scorer="cls") as patch:
        assert answer(model) == want and patch.config == config


def test_context_manager_removes_after_an_exception():
    model = tiny_llava()
    with pytest.raises(KeyError), lp_patch.applied(model, tokens=5):
        assert lp_patch.is_applied(model)
        raise KeyError
    assert not lp_patch.is_applied(model)


def test_patching_again_replaces():
    model = tiny_llava()
    first = lp_patch.apply(model, tokens=5)
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    second = lp_patch.apply(model, tokens=9)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert not first.active and second.active
    logits(model)
    assert second.trace is not None and first.trace is None
    first.remove()
    assert lp_patch.is_applied(model)


def test_two_models_do_not_touch_each_other():
    one, other = tiny_llava(seed=1), tiny_llava(seed=2)
    plain = logits(other)
    patch = lp_patch.apply(one, tokens=5)
    assert torch.equal(logits(other), plain)
    assert not lp_patch.is_applied(other)
    second = lp_patch.apply(other, tokens=9)
    logits(one)
    assert second.trace is None
    patch.remove()
    assert lp_patch.is_applied(other)


def test_models_that_share_a_config_do_not_share_a_patch():
    one = tiny_llava(seed=1)
    other = type(one)(one.config).double().eval()
    other.load_state_dict(one.state_dict())
    plain = logits(other)
    with lp_patch.applied(one, tokens=5, scorer="cls"):
        logits(one)
        assert torch.equal(logits(other), plain)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_copy_of_a_patched_model_is_a_patched_model_of_its_own(options):
    model = tiny_llava()
    patch = apply(model, options)
    want = answer(model)
    twin = copy.deepcopy(model)
    assert lp_patch.is_applied(twin)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert answer(model) == want, "the original changed with its copy"
    scaled = copy.deepcopy(twin)
    lp_patch.remove(scaled)
    assert lp_patch.is_applied(twin) and not lp_patch.is_applied(scaled)
    fresh = apply(scaled, options)
    assert answer(twin) == answer(scaled)
    assert fresh.trace is not None
    lp_patch.remove(twin)
    assert lp_patch.is_applied(model) and patch.active
    assert answer(model) == want


def test_pickle_and_torch_save_of_a_patched_model():
    model = tiny_llava()
    lp_patch.apply(model, tokens=5, scorer="cls")  # before any forward: transformers' own hooks do not pickle
    again = pickle.loads(pickle.dumps(model))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    want = answer(model)
    for twin in (again, loaded):
        assert lp_patch.is_applied(twin)
        assert answer(twin) == want
        lp_patch.remove(twin)
        assert not lp_patch.is_applied(twin)


def test_save_pretrained_of_a_patched_model_loads_unpatched(tmp_path):
    model = tiny_llava(dtype=torch.float32)
    want = logits(model)
    with lp_patch.applied(model, tokens=5, scorer="cls"):
        model.save_pretrained(tmp_path)
    assert not [f for f in tmp_path.glob("*.json") if "lp_patch" in f.read_text()]
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not lp_patch.is_applied(loaded)
    assert torch.equal(logits(loaded), want)


def test_the_attention_back_end_can_change_under_a_patch():
    model = tiny_llava()
    with lp_patch.applied(model, tokens=5, scorer="cls"):
        first = logits(model)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(logits(model), first, rtol=1e-4, atol=1e-4)
    assert model.config.text_config._attn_implementation == "eager"
    assert model.model.language_model.layers[1].self_attn.config._attn_implementation == "eager"


def test_the_handle_reads_well():
    model = tiny_llava()
    patch = lp_patch.apply(model, tokens=5, final_wipe_layer=5)
    for part in ("LLaVA", "active", "tokens=5", "diversity", "layer 2 of 6", "none after layer 5"):
        assert part in repr(patch)
    answer(model)
    text = str(patch.report())
    assert "prefill" in text and "KV" in text and "wiped" in text
    patch.remove()
    assert "removed" in repr(patch)


def test_report_counts_what_ran():
    model = tiny_llava()
    with lp_patch.applied(model, tokens=5) as patch:
        with torch.no_grad():
            cache = model(**inputs_for(model), use_cache=True)[CACHE]
        report = patch.report()
    stored = [layer.keys.shape[2] for layer in cache.layers]
    assert stored == [3 + 9 + 9] * 2 + [3 + 9 + 3] * 4
    assert [cost.kv_bytes for cost in report.layers] == [
        layer.keys.numel() * 8 + layer.values.numel() * 8 for layer in cache.layers
    ]
    layer = model.model.language_model.layers[0]
    weights = sum(p.numel() for n, p in layer.named_parameters() if "proj" in n)
    assert report.layers[0].flops == 2 * weights * 21 + 2 * 32 * 21**2
    assert sum(report.trace.tokens_per_layer[0]) / 6 == 5.0


def test_cache_operations_on_short_layers():
    model = tiny_llava(seed=3)
    inputs = batch([tokens(3, "image", 9), tokens(2, "image", 4, "image", 3, seed=1)], images(3))
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with lp_patch.applied(model, tokens=5), torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        width = inputs["input_ids"].shape[1]
        step = {"input_ids": torch.tensor([[7], [8]]), "attention_mask": torch.ones(2, width + 1)}
        step["attention_mask"][:, :width] = inputs["attention_mask"]

        def again(cache, rows):
            cache = copy.deepcopy(cache)
            chosen = {name: value[rows] for name, value in step.items()}
            chosen["position_ids"] = (chosen["attention_mask"].cumsum(-1) - 1)[:, -1:].long()
            return model(**chosen, **{CACHE: cache}).logits

        want = again(cache, [0, 1])
        for change, rows in [
            (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
            (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
            (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        ]:
            other = copy.deepcopy(cache)
            change(other)
            torch.testing.assert_close(again(other, rows), want[rows], rtol=1e-5, atol=1e-5)
        cropped = pickle.loads(pickle.dumps(cache))
        cropped.crop(-2)
        assert cropped.get_seq_length() == width - 2
        back = {
            "input_ids": inputs["input_ids"][:, -2:],
            "attention_mask": inputs["attention_mask"],
            "position_ids": (inputs["attention_mask"].cumsum(-1) - 1)[:, -2:],
        }
        model(**back, **{CACHE: cropped})
        torch.testing.assert_close(again(cropped, [0, 1]), want, rtol=1e-5, atol=1e-5)
        with pytest.raises(lp_patch.UnsupportedInputError, match="-3 to 0"):
            copy.deepcopy(cache).crop(-4)
        lp_patch.remove(model)
        stock = model(**batch([tokens(4)], None), use_cache=True)[CACHE]
        stock.reset()
        if stock.get_seq_length() > 0:
            return  # older resets zero the entries and keep their number
        lp_patch.apply(model, tokens=5)
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(**inputs, **{CACHE: cache}).logits, model(**inputs).logits)


def test_compile_does_not_miss_a_later_patch():
    model = tiny_llava(dtype=torch.float32, layers=3)
    compiled = torch.compile(model.forward, backend="eager", dynamic=False)
    inputs = inputs_for(model)
    with torch.no_grad():
        plain = compiled(**inputs).logits
        with lp_patch.applied(model, tokens=5) as patch:
            want = model(**inputs).logits
            torch.testing.assert_close(compiled(**inputs).logits, want)
            assert len(patch.trace.stage1[0]) == 9
        torch.testing.assert_close(compiled(**inputs).logits, plain)


class Counter:
    """A compiler back-end that compiles nothing and counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def __call__(self, graph, inputs):
        self.asked += 1
        return graph.forward


def test_compile_forgets_this_model_alone():
    model, counter = tiny_llava(dtype=torch.float32, layers=2), Counter()
    other, scale = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GELU()), torch.tensor(2.0)
    unrelated = [torch.compile(x, backend=counter) for x in (other, lambda x: scale * x)]
    # the hook that prunes here stands inside one graph of the whole decoder: no guard looks at it
    compiled = torch.compile(model, backend="eager", dynamic=False)
    inputs = inputs_for(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        torch.testing.assert_close(compiled(**inputs).logits, plain)
        for run in unrelated:
            run(torch.ones(1, 2))
        assert counter.asked == 2
        with lp_patch.applied(model, tokens=5, stage_ratio=1) as patch:
            want = model(**inputs).logits
            torch.testing.assert_close(compiled(**inputs).logits, want)
            assert patch.trace.tokens_per_layer == [[5] * 2]
        torch.testing.assert_close(compiled(**inputs).logits, plain)
        for run in unrelated:
            run(torch.ones(1, 2))
        assert counter.asked == 2, "an unrelated function was compiled again"


@pytest.mark.parametrize("known", [True, False])
def test_a_hook_inside_a_compiled_function_is_noticed(known, monkeypatch):
    """Whoever compiled it, and where another torch keeps its guards otherwise."""
    import torch._dynamo.eval_frame as eval_frame

    class Inner(torch.nn.Module):
        def forward(self, x):
            return x + 1

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inners = torch.nn.ModuleList([Inner()])

        def forward(self, x):
            for inner in self.inners:
                x = inner(x)
            return x

    if not known:
        monkeypatch.delattr(eval_frame, "_debug_get_cache_entry_list")
    outer, installation, x = Outer(), Installation(), torch.ones(2)
    run = torch.compile(lambda x: 3 * outer(x), backend="eager")
    assert run(x).tolist() == [6, 6]
    installation.before(outer.inners[0], lambda module, args, kwargs: ((args[0] + 1,), kwargs))
    forget_compiled(outer)
    assert run(x).tolist() == [9, 9]
    installation.remove()
    forget_compiled(outer)
    assert run(x).tolist() == [6, 6]


def test_a_disabled_wrapper_stays_so_in_copies():
    module = torch.nn.Linear(2, 2)
    installation = Installation()
    installation.wrap(module, "extra_repr", _shout)
    ours = module.extra_repr
    assert ours() == "IN_FEATURES=2, OUT_FEATURES=2, BIAS=TRUE"
    assert copy.deepcopy(module).extra_repr() == ours()
    module.extra_repr = partial(_ask, ours)
    with pytest.warns(UserWarning, match=r"Linear\.extra_repr"):
        installation.remove()
    assert module.extra_repr() == "in_features=2, out_features=2, bias=True?"
    for twin in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin() == "in_features=2, out_features=2, bias=True"


def _ask(method):
    return method() + "?"


def _shout(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs).upper()


def test_images_that_go_unpruned_are_announced_once():
    model = tiny_llava()
    with lp_patch.applied(model, tokens=5) as patch, torch.no_grad():
        # a stand-in for code that encodes on its own way
        encode, model.model.get_image_features = model.model.get_image_features, type(model.model).get_image_features
        model.model.get_image_features = model.model.get_image_features.__get__(model.model)
        with pytest.warns(UserWarning, match="nothing is pruned") as caught:
            model(**inputs_for(model))
            model(**inputs_for(model))
        assert len(caught) == 1 and patch.trace.visual_tokens == [0]
        model.model.get_image_features = encode


@pytest.mark.parametrize("learned", [False, True])
def test_a_saved_setting_patches_alike(tmp_path, learned):
    model = tiny_llava()
    given = make_pruner() if learned else None
    with lp_patch.applied(model, tokens=5, stage_ratio=2, final_wipe_layer=5, pruner=given) as patch:
        patch.save_pretrained(tmp_path)
        want, config = answer(model), patch.config
    with lp_patch.applied(model, tmp_path) as patch:
        assert answer(model) == want and patch.config == config
        assert (patch._settings.scorer.name == "learned") == learned
    with lp_patch.applied(model, str(tmp_path), ratio=0.5) as patch:
        assert (patch.config.tokens, patch.config.ratio, patch.config.final_wipe_layer) == (None, 0.5, 5)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"tokens": 5}', '{"format_version": 2, "tokens": 5}', '{"format_version": 1, "token": 5}',
     '{"format_version": 1, "tokens": -5}'],
)  # fmt: skip
def test_a_wrong_setting_file_is_refused(tmp_path, content):
    (tmp_path / "pruning.json").write_text(content)
    with pytest.raises(lp_patch.ConfigError):
        lp_patch.apply(tiny_llava(), tmp_path)
    with pytest.raises(lp_patch.ConfigError, match="cannot read"):
        lp_patch.apply(tiny_llava(), tmp_path / "nowhere")
