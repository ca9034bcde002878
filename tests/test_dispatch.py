"""What a patch adds to a forward in operations and waits: on a GPU at batch 1, time is what the host dispatches."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from counting import Counted
from families import FAMILIES, Original, make
from tiny import CACHE
from torch.overrides import TorchFunctionMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import lp_patch

TOKENS = 576
OPTIONS = {
    "diversity": ({}, 1.12),
    "uniform": ({"scorer": "uniform"}, 1.12),
    "uniform, one stage": ({"scorer": "uniform", "stage_ratio": 1}, 1.08),
    "learned": ({"scorer": "learned"}, 1.12),
    "covering": ({"scorer": "covering"}, 1.12),
}


@pytest.fixture(scope="module")
def deep():
    """LLaVA-1.5's shape, but for the widths, and a prompt for it."""
    torch.manual_seed(0)
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**narrow, num_hidden_layers=24, image_size=336, patch_size=14),
            text_config=LlamaConfig(**narrow, vocab_size=60, num_hidden_layers=32, pad_token_id=0),
            image_token_id=1,
        )
    ).eval()
    ids = torch.tensor([[7] * 36 + [1] * TOKENS + [9] * 24])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336)}
    count(model, inputs)  # transformers' own set-up at the first forward
    return model, inputs, count(model, inputs)


@torch.no_grad()
def count(model, inputs):
    """Operations of a prefill, and of the decode step after it."""
    with Counted() as prefill:
        out = model(**inputs, use_cache=True)
    length = inputs["input_ids"].shape[1]
    with Counted() as step:
        model(input_ids=torch.tensor([[5]]), position_ids=torch.tensor([[length]]), **{CACHE: out[CACHE]})
    return prefill, step


@pytest.mark.parametrize("name", OPTIONS)
def test_operations(deep, name, record_property):
    model, inputs, (prefill, step) = deep
    options, most = OPTIONS[name]
    pruner = lp_patch.LearnablePruner(16, 8) if name in ("learned", "covering") else None
    with lp_patch.applied(model, tokens=32, pruner=pruner, **options) as patch:
        pruned, pruned_step = count(model, inputs)
    assert len(patch.trace.stage1[0]) < 60
    record_property("ratio", pruned.total / prefill.total)
    assert pruned.total <= most * prefill.total, pruned.ops - prefill.ops
    assert pruned.waits <= prefill.waits
    assert pruned_step.total <= 1.003 * step.total, pruned_step.ops - step.ops


def test_full_budget_adds_next_to_nothing(deep):
    model, inputs, (prefill, step) = deep
    with lp_patch.applied(model, tokens=TOKENS):
        full, full_step = count(model, inputs)
    assert full.total <= prefill.total + 4 and full_step.total == step.total


def alone(family):
    """A model, and a prompt of it in one row without padding."""
    model, scene = make(family, torch.float32, (0,), seed=3)
    return model, scene.forward()


@pytest.mark.parametrize("family", [x for x in FAMILIES if x != "llava_llama"])
def test_operations_by_family(family):
    """What is added does not depend on the number of layers: at most what 1.12 allows the shape above."""
    model, inputs = alone(family)
    count(model, inputs)
    prefill, step = count(model, inputs)
    with lp_patch.applied(model, tokens=4):
        pruned, pruned_step = count(model, inputs)
    assert pruned.total - prefill.total <= 160, pruned.ops - prefill.ops
    assert pruned_step.total <= step.total, pruned_step.ops - step.ops


WAITING = ("cpu", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__len__")


@pytest.fixture
def waits(monkeypatch):
    """Where lp_patch asks a tensor for its numbers, or makes one on a device out of the host's, which waits too."""
    found, root = Counter(), str(Path(lp_patch.__file__).parent)

    def watched(name):
        own = getattr(torch.Tensor, name)

        def call(self, *args, **kwargs):
            frame = sys._getframe(1)
            if frame.f_code.co_filename.startswith(root) and name != "__len__":
                found[f"{Path(frame.f_code.co_filename).name}: {name}"] += 1
            return own(self, *args, **kwargs)

        return call

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, watched(name))

    class Made(
        TorchFunctionMode
    ):  # torch.tensor itself must stay: torch looks it up by identity, and keeps what it saw
        def __torch_function__(self, func, types, args=(), kwargs=None):
            path = Path(sys._getframe(1).f_code.co_filename)
            if func is torch.tensor and str(path).startswith(root) and "device" in (kwargs or {}):
                found[f"{path.name}: torch.tensor"] += 1
            return func(*args, **(kwargs or {}))

    with Made():
        yield found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", [(0,), (0, 1, 2)], ids=["alone", "padded"])
@torch.no_grad()
def test_one_wait_for_the_device(family, which, waits):
    model, scene = make(family, torch.float32, which, seed=3)
    inputs = scene.forward()
    with lp_patch.applied(model, tokens=4):
        model(**inputs)
        first = dict(waits)
        waits.clear()
        model(**inputs)
    extra = {"read.py: tolist", "read.py: cpu", "read.py: __bool__"} if isinstance(scene, Original) else set()
    assert {name for name in first if name not in extra} == {"prompt.py: cpu"}
    assert waits["prompt.py: cpu"] == 1


def called_in_a_step(model, inputs):
    """Python hooks of lp_patch that a decode step on a dynamic cache calls."""
    out = model(**inputs, use_cache=True)
    found, root = Counter(), str(Path(lp_patch.__file__).parent)
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]
    length = inputs["input_ids"].shape[1]

    def profile(frame, event, arg):
        name = frame.f_code.co_name
        if event == "call" and frame.f_code.co_filename.startswith(root) and name.startswith(("before_", "after_")):
            found[name] += 1

    sys.setprofile(profile)
    try:
        model(input_ids=torch.tensor([[5]]), position_ids=torch.tensor([[length]]), **{CACHE: out[CACHE]})
    finally:
        sys.setprofile(None)
    return found, hooks


@torch.no_grad()
def test_no_hook_of_a_layer_is_called_in_vain(deep):
    """In decoding without padding three hooks look at what the call shows, however many layers there are."""
    model, inputs, _ = deep
    with lp_patch.applied(model, tokens=32):
        found, hooks = called_in_a_step(model, inputs)
    assert set(found) == {"before_model", "before_base", "before_language_model"}
    assert not [hook for hook in hooks if getattr(getattr(hook, "func", hook), "__name__", "") == "before_layer"]


@torch.no_grad()
def test_a_mask_of_ones_costs_a_step_no_more_than_stock(deep):
    """generate() always brings one: it is looked at once, and not by the layers."""
    model, inputs, _ = deep

    def step():
        out = model(**inputs, use_cache=True)
        length = inputs["input_ids"].shape[1]
        given = {"position_ids": torch.tensor([[length]]), "attention_mask": torch.ones(1, length + 1)}
        with Counted() as counted:
            model(input_ids=torch.tensor([[5]]), **given, **{CACHE: out[CACHE]})
        return counted

    stock = step()
    with lp_patch.applied(model, tokens=32):
        pruned = step()
    assert pruned.total <= 1.003 * stock.total, pruned.ops - stock.ops
    assert pruned.waits <= stock.waits
