"""Which models are found, how their wrappers are seen through, and what each refusal says."""

import copy
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tiny import IMAGE, LAYERS, WIDTH, tiny_llava
from torch import nn
from transformers import (
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaModel,
    MistralConfig,
    Qwen2Config,
    Trainer,
    TrainingArguments,
    pipeline,
)

import lp_patch
from lp_patch import Adapter, ConfigError, UnsupportedModelError, registry
from lp_patch.registry import find_parts, unwrap

ADAPTERS = Path(registry.__file__).parent.parent / "adapters"


@pytest.fixture
def adapters(monkeypatch):
    """A registry of this test's own."""
    lp_patch.supported()
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))
    return registry._adapters


@pytest.fixture
def fresh(monkeypatch):
    """A registry that has read nothing yet, and stands for the packages installed."""
    points = []
    monkeypatch.setattr(registry, "_adapters", {})
    monkeypatch.setattr(registry, "_broken", {})
    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "lp_patch.adapters" else [])
    return points


class Point:
    """An installed package's entry point."""

    value = "my_vlm:ADAPTER"

    def __init__(self, found, name="mine"):
        self.found, self.name = found, name

    def load(self):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture(scope="module")
def built_in():
    """What a registry that has read nothing finds where no other package is installed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, empty in (("_adapters", {}), ("_broken", {}), ("_loaded", False), ("entry_points", lambda group: [])):
            patch.setattr(registry, name, empty)
        return set(lp_patch.supported())


@pytest.fixture(scope="module")
def shared():
    return tiny_llava(dtype=torch.float32)


@pytest.fixture
def model(shared):
    return copy.deepcopy(shared)


def test_built_in(built_in):
    """Every file of `adapters/` is found by itself."""
    declared = re.findall(r'model_type="(\w+)"', "".join(x.read_text() for x in ADAPTERS.glob("*.py")))
    assert set(declared) <= built_in
    assert {"llava", "llava_llama", "qwen3_vl", "gemma3", "paligemma"} <= built_in


def test_supported():
    assert lp_patch.supported()["llava"] == "LLaVA"
    assert list(lp_patch.supported()) == sorted(lp_patch.supported())
    lp_patch.supported().clear()  # a copy
    assert "llava" in lp_patch.supported()


def test_find_parts(model):
    parts = find_parts(model)
    assert parts.adapter.model_type == "llava"
    assert parts.base is model.model
    assert parts.projector is model.model.multi_modal_projector
    assert parts.language_model is model.model.language_model
    assert parts.rotary is model.model.language_model.rotary_emb
    assert len(parts.layers) == LAYERS
    assert all(a is b for a, b in zip(parts.layers, model.model.language_model.layers, strict=True))
    assert all(a is b.self_attn for a, b in zip(parts.attention, parts.layers, strict=True))
    assert parts.width == WIDTH
    assert [(m.name, m.encode, m.placeholder) for m in parts.modalities] == [("image", "get_image_features", IMAGE)]
    model.config.image_token_id = 7
    assert parts.modalities[0].placeholder == 7  # as the config says now
    assert find_parts(model.model).base is model.model  # without the head


def test_width_of_several_feature_layers(model):
    model.config.vision_feature_layer = [-2, -1, 0]
    assert find_parts(model).width == 3 * WIDTH


def test_unknown_model_type_says_where_to_see_what_is_supported_and_how_to_add():
    bert = BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    )
    with pytest.raises(UnsupportedModelError, match=r"no adapter for BertModel \(model type 'bert'\)") as error:
        lp_patch.apply(bert)
    message = str(error.value)
    assert "lp_patch.supported() lists the model types that can be patched" in message
    assert "CONTRIBUTING.md shows how to add one" in message
    assert isinstance(error.value, TypeError)


def test_module_without_config():
    with pytest.raises(UnsupportedModelError, match=r"no adapter for Linear \(model type None\)"):
        find_parts(nn.Linear(2, 2))


@pytest.mark.parametrize("thing", [None, 3, "llava-hf/llava-1.5-7b-hf", {"model": 1}, nn.Linear])
def test_no_model_at_all(thing):
    with pytest.raises(UnsupportedModelError, match=r"needs a vision-language model \(an nn\.Module\), got ") as error:
        lp_patch.apply(thing)
    assert type(thing).__name__ in str(error.value)


def test_what_is_mistaken_for_a_model_says_the_next_step(model):
    testbed = Path(__file__).parent.parent / "examples" / "testbed" / "model"
    processor = AutoProcessor.from_pretrained(testbed)
    read = "That prepares inputs: give the model that reads them"
    whole = "has no vision_config: if it is a part of a vision-language model, give the whole model"
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    for thing, said in [
        ("org/name", "Load it first: AutoModelForImageTextToText.from_pretrained('org/name')"),
        (Path("folder"), "Load it first: AutoModelForImageTextToText.from_pretrained('folder')"),
        (pipe, "Give the model that this ImageTextToTextPipeline holds: its .model"),
        (Trainer(model, TrainingArguments(report_to=[])), "Give the model that this Trainer holds: its .model"),
        (processor, read),
        (processor.tokenizer, read),
        (processor.image_processor, read),
        (type(model), "That is a class: give an instance"),
        (model.model.language_model, whole),
        (model.model.vision_tower, whole),
        (model.model.multi_modal_projector, whole),
        (model.lm_head, whole),
    ]:
        for call in (lp_patch.apply, find_parts):
            with pytest.raises(UnsupportedModelError, match=re.escape(said)):
                call(thing)


@pytest.mark.parametrize(
    "path", ["multi_modal_projector", "language_model", "language_model.layers", "language_model.rotary_emb"]
)
def test_missing_patch_point_is_named(model, path):
    owner, _, name = path.rpartition(".")
    delattr(model.model.get_submodule(owner), name)
    with pytest.raises(UnsupportedModelError) as error:
        lp_patch.apply(model)
    message = str(error.value)
    assert f"LlavaForConditionalGeneration has no '{path}" in message
    assert "LLaVA adapter" in message
    assert f"transformers {version('transformers')}" in message
    assert not lp_patch.is_applied(model)


def test_missing_attention_of_one_layer(model):
    del model.model.language_model.layers[-1].self_attn
    with pytest.raises(UnsupportedModelError, match="has no 'self_attn' below LlamaDecoderLayer"):
        find_parts(model)


def test_missing_method_and_field(model, adapters):
    llava = adapters["llava"]
    for field in ("encode", "placeholder"):
        wrong = llava.modalities[0]._replace(**{field: "nowhere"})
        adapters["llava"] = Adapter(**{**vars(llava), "modalities": (wrong,)})
        with pytest.raises(UnsupportedModelError, match="has no 'nowhere' below"):
            find_parts(model)


def test_too_few_layers():
    with pytest.raises(UnsupportedModelError, match="needs 2 decoder layers or more, found 1"):
        find_parts(tiny_llava(layers=1, dtype=torch.float32))


def tiny_text(config, **options):
    """A LLaVA without a head over this text config."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    return LlavaModel(LlavaConfig(vision_config=vision, text_config=config(vocab_size=60, **sizes, **options)))


def test_kinds_of_layers():
    """Read from the layers and the config; a window is one where the layers have it."""
    kv = {"num_key_value_heads": 2}
    kinds = find_parts(tiny_text(MistralConfig, sliding_window=8, **kv)).kinds
    assert (kinds.names, kinds.windows) == ((registry.MASKED,) * 2, (8, 8))
    assert find_parts(tiny_text(MistralConfig, sliding_window=None, **kv)).kinds.plain
    windows = {"use_sliding_window": True, "sliding_window": 8, **kv}
    kinds = find_parts(tiny_text(Qwen2Config, layer_types=["full_attention", "sliding_attention"], **windows)).kinds
    assert (kinds.names, kinds.windows) == ((registry.FULL, registry.MASKED), (None, 8))
    assert (kinds.scoring(), kinds.reached(8), kinds.reached(9)) == ([1], False, True)
    assert find_parts(tiny_text(Qwen2Config, layer_types=["full_attention"] * 2, **windows)).kinds.plain
    # Llama's layers have no window, whatever the config carries
    stray = tiny_text(LlamaConfig)
    stray.config.text_config.sliding_window = stray.language_model.config.sliding_window = 8
    assert find_parts(stray).kinds.plain


def test_layers_with_a_state_beside_their_keys_are_refused(model):
    model.model.language_model.config.layer_types = ["full_attention"] * (LAYERS - 1) + ["hybrid"]
    with pytest.raises(UnsupportedModelError, match=rf"decoder layer {LAYERS} has a state beside its keys \(hybrid\)"):
        lp_patch.apply(model)
    assert not lp_patch.is_applied(model)


class DistributedDataParallel(nn.Module):
    """Of torch's name and shape, without a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Peft(nn.Module):
    """Of PEFT's shape."""

    def __init__(self, model):
        super().__init__()
        self.peft_config = {}
        self.inner = model

    def get_base_model(self):
        return self.inner


class Other(nn.Module):
    """Looks like none of them, though it has a `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def compiled(model):
    return torch.compile(model, backend="eager")  # wraps; compiles at the first call


def test_unwrap(model):
    assert unwrap(model) is model
    wrappers = (DistributedDataParallel, nn.DataParallel, Peft, compiled)
    for outer in wrappers:
        assert unwrap(outer(model)) is model
        for inner in wrappers:
            if outer is not compiled or inner is not compiled:  # of the two, torch makes a function
                assert unwrap(outer(inner(model))) is model
    assert find_parts(DistributedDataParallel(compiled(Peft(model)))).base is model.model


class Whole(nn.Module):
    """A model that has others within, beside parts without an adapter: of a Qwen Omni's shape."""

    def __init__(self, **parts):
        super().__init__()
        self.config = BertConfig()
        self.talker = nn.Linear(2, 2)
        for name, part in parts.items():
            setattr(self, name, part)


def test_unwrap_goes_into_the_one_part_that_has_an_adapter(model):
    whole = Whole(thinker=model)
    assert unwrap(whole) is model
    assert unwrap(DistributedDataParallel(whole)) is model
    with lp_patch.applied(whole, tokens=5):
        assert lp_patch.is_applied(model) and lp_patch.is_applied(whole)
    assert not lp_patch.is_applied(model)
    two = Whole(thinker=model, another=copy.deepcopy(model))
    assert unwrap(two) is two  # which of them is not for us to say
    with pytest.raises(UnsupportedModelError, match=r"no adapter for Whole \(model type 'bert'\)"):
        lp_patch.apply(two)
    assert unwrap(model) is model  # nor is a whole that has an adapter left for its parts


def test_unwrap_stops_at_what_it_does_not_know(model):
    other = Other(model)
    assert unwrap(other) is other
    with pytest.raises(UnsupportedModelError, match=r"no adapter for Other \(model type None\)"):
        find_parts(DistributedDataParallel(other))


def test_wrapper_around_no_module():
    broken = DistributedDataParallel(nn.Identity())
    broken._modules["module"] = None
    with pytest.raises(UnsupportedModelError, match=r"an nn\.Module\), got DistributedDataParallel"):
        unwrap(broken)


def mine(model_type="mine"):
    return Adapter(model_type=model_type, family="Mine", width=lambda config: 8)


def test_register(adapters, model):
    lp_patch.register(mine())
    assert lp_patch.supported()["mine"] == "Mine"
    model.config.model_type = "mine"
    assert find_parts(model).adapter.family == "Mine"
    assert find_parts(model).width == 8


def test_register_refuses_a_taken_type(adapters):
    before = dict(adapters)
    with pytest.raises(ConfigError, match=r"model type 'llava' already has an adapter \(LLaVA\)"):
        lp_patch.register(mine("llava"))
    lp_patch.register(mine())
    with pytest.raises(ConfigError, match=r"model type 'mine' already has an adapter \(Mine\)"):
        lp_patch.register(mine())
    assert {**before, "mine": adapters["mine"]} == adapters


@pytest.mark.parametrize("thing", [None, "llava", Adapter, {"model_type": "mine"}])
def test_register_takes_adapters_only(adapters, thing):
    before = dict(adapters)
    with pytest.raises(ConfigError, match=f"register takes an lp_patch.Adapter, got {type(thing).__name__}"):
        lp_patch.register(thing)
    assert adapters == before


def test_register_before_anything_was_read_still_sees_the_built_in(fresh):
    with pytest.raises(ConfigError, match="'llava' already has an adapter"):
        lp_patch.register(mine("llava"))


def test_entry_points_of_installed_packages(fresh, built_in):
    fresh += [Point(mine()), Point(mine("another"))]
    assert list(lp_patch.supported()) == sorted({*built_in, "another", "mine"})
    assert lp_patch.supported()["mine"] == "Mine"


BROKEN = [
    (ImportError("no module named vlm"), "mine", "ImportError: no module named vlm"),
    (TypeError("Adapter() got an unexpected argument"), "mine", "TypeError: Adapter.. got an unexpected argument"),
    ("no adapter", "mine", "ConfigError: an entry point must name an lp_patch.Adapter, got 'no adapter'"),
    (mine("qwen2_vl"), "qwen2_vl", "ConfigError: two adapters for the model type 'qwen2_vl'"),
]


@pytest.mark.parametrize(("found", "claimed", "match"), BROKEN, ids=[str(x[0])[:12] for x in BROKEN])
def test_a_broken_entry_point_costs_its_own_type_alone(fresh, built_in, model, found, claimed, match):
    fresh += [Point(found), Point(mine("another"), "another")]
    said = rf"entry point 'mine' \(my_vlm:ADAPTER\) .* is broken, so models of type '{claimed}' cannot be .*: {match}"
    with pytest.warns(UserWarning, match=said) as caught:
        supported = lp_patch.supported()
        lp_patch.supported()
        with lp_patch.applied(model, tokens=5):
            pass
    assert len(caught) == 1
    assert set(supported) == {*built_in, "another"}
    model.config.model_type = claimed
    with pytest.raises(UnsupportedModelError, match=f"package has for the model type '{claimed}' is broken: ") as error:
        lp_patch.apply(model)
    assert isinstance(error.value.__cause__, Exception)
    if claimed == "mine":
        lp_patch.register(mine())  # by hand, it is whole
        assert find_parts(model).adapter.family == "Mine"
