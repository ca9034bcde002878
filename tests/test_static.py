"""A decode step on a pruned static cache, which generate() compiles: one graph, as unpatched, and right."""

import pytest
import torch
from families import FAMILIES, make
from tiny import CACHE, V5
from tiny_models import TYPES
from tiny_models import make as make_type
from transformers import CompileConfig, DynamicCache, StaticCache

import lp_patch

OPTIONS = {"tokens": 4, "layer": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
NEW = 4
NORMAL = ("llava", "qwen2_5_vl")
TWO = ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.long)]
pytestmark = [
    pytest.mark.skipif(not V5, reason="before 5 a static cache counts in another way"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch warns of itself
]
families = pytest.mark.parametrize(
    "family",
    [x if x in NORMAL else pytest.param(x, marks=pytest.mark.long) for x in FAMILIES if x != "llava_llama"],
)  # llava-torch does not generate here


def steps():
    """A way to compile each decode step as one graph, a break in which raises; and the graphs that were made."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True  # else on accelerators alone
    return config, graphs


def tiny(family, which=(0, 1, 2), seed=70):
    torch._dynamo.reset()
    model, scene = make(family, torch.float32, which, seed=seed)
    if family == "qwen3_vl_moe":
        model.set_experts_implementation("batched_mm")  # the one by one does not compile, patched or not
    return model, scene


def generate(model, inputs, **options):
    """What is said, (B, n), and its logits."""
    mute = {0, *(getattr(model.config, f"{name}_token_id", 0) for name in ("image", "video"))}
    out = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True,
        suppress_tokens=sorted(mute), **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, dim=1)


def both(model, scene, config, **options):
    """On a dynamic and on a compiled static cache; the latter's sequences."""
    want = generate(model, scene.inputs, **options)
    got = generate(model, scene.inputs, cache_implementation="static", compile_config=config, **options)
    assert got[0].tolist() == want[0].tolist()
    torch.testing.assert_close(got[1], want[1], **CLOSE)
    return got[0]


@families
def test_one_graph(family):
    model, scene = tiny(family)
    _, other = make(family, torch.float32, seed=71)
    with lp_patch.applied(model, **OPTIONS):
        config, graphs = steps()
        both(model, scene, config)
        assert len(graphs) == 1
        # a second prompt of the same shape, with other pictures
        for name, x in other.inputs.items():
            if name.startswith("pixel_values"):
                other.inputs[name] = x.flip(-1)
        both(model, other, config)
        both(model, scene, config)
        assert len(graphs) == 1


@pytest.mark.long
@pytest.mark.parametrize("family", NORMAL)
def test_after_the_patch_and_before_it(family):
    """A graph that was made without the patch is not used under it, nor the other way round."""
    model, scene = tiny(family, which=(0,))
    config, _ = steps()
    plain = both(model, scene, config)
    with lp_patch.applied(model, **OPTIONS):
        assert both(model, scene, config).tolist() != plain.tolist()
        # text alone, on the cache that held a pruned prompt
        _, text = make(family, torch.float32, which=(2,), seed=70)
        both(model, text, config)
    assert both(model, scene, config).tolist() == plain.tolist()
    assert both(model, text, config) is not None


@pytest.mark.parametrize("family", TWO)
@pytest.mark.parametrize(
    "options", [{"final_wipe_layer": 4}, {"stage_ratio": 1.0}, {"positions": "compact"}], ids=lambda x: next(iter(x))
)
def test_options(family, options):
    if family == "qwen2_5_vl" and "positions" in options:
        pytest.skip("compact positions have no meaning for it")
    model, scene = tiny(family)
    with lp_patch.applied(model, **OPTIONS, **options):
        config, graphs = steps()
        new = both(model, scene, config)[:, -NEW:]
        assert len(graphs) == 1
    named = {"wipe" if name == "final_wipe_layer" else name: value for name, value in options.items()}
    want = scene.want(model, new, **OPTIONS, **named).logits[:, -NEW - 1 : -1]
    with lp_patch.applied(model, **OPTIONS, **options):
        found = generate(model, scene.inputs, cache_implementation="static")[1]
    torch.testing.assert_close(found, want.float(), **CLOSE)


@pytest.mark.parametrize("family", TWO)
def test_beams(family):
    model, scene = tiny(family)
    with lp_patch.applied(model, **OPTIONS):
        options = {"num_beams": 3, "num_return_sequences": 2}
        config, graphs = steps()
        both(model, scene, config, **options)
        assert len(graphs) <= 1


@pytest.mark.parametrize("family", [*NORMAL, "internvl"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_later_turns_on_a_kept_cache(family, compiled):
    """The turns after a pruned one, and another conversation on the same cache after its reset."""
    model, scene = tiny(family, which=(0,))
    _, other = make(family, torch.float32, which=(1,), seed=72)
    extra = {"compile_config": steps()[0]} if compiled else {}

    def talk(cache, inputs, **options):
        found = []
        for turn in range(3):
            said, logits = generate(model, inputs, **{CACHE: cache}, **options)
            found.append(logits)
            ids = torch.cat([said, torch.tensor([[30 + turn, 40, 50 - turn]])], dim=1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return found

    with lp_patch.applied(model, **OPTIONS):
        static = StaticCache(config=model.config.get_text_config(), max_cache_len=160)
        for conversation in (scene, other, scene):
            want = talk(DynamicCache(config=model.config.get_text_config()), conversation.inputs)
            torch.testing.assert_close(talk(static, conversation.inputs, **extra), want, **CLOSE)
            static.reset()


NORMAL_TYPES = ("gemma3", "lfm2_vl")


@pytest.mark.parametrize(
    "kind",
    [
        x if x in NORMAL_TYPES else pytest.param(x, marks=[pytest.mark.long, pytest.mark.matrix])
        for x, tiny in TYPES.items()
        if tiny.static
    ],
)
def test_one_graph_of_a_type(kind, record_property):
    """Where the unpatched type's step is one graph, so is the patched one's, for the next prompt too."""
    torch._dynamo.reset()
    model, scene = make_type(kind, dtype=torch.float32, seed=70, which=(0, 1))
    try:
        if any("experts" in name for name, _ in model.named_modules()):
            model.set_experts_implementation("batched_mm")  # the one by one does not compile, patched or not
        config, graphs = steps()
        both(model, scene, config)
    except AssertionError:
        record_property("cell", "not applicable: stock says something else on a static cache")
        return
    except Exception as error:
        record_property("cell", f"not applicable: stock does not compile ({type(error).__name__})")
        return
    stock = len(graphs)
    torch._dynamo.reset()
    with lp_patch.applied(model, tokens=4, layer=TYPES[kind].layer):
        config, graphs = steps()
        both(model, scene, config)
        made = len(graphs)
        both(model, scene, config)
    assert 1 <= made <= stock and len(graphs) == made  # a window that slides costs stock another graph
