"""lmms-eval's entry point, on stand-ins for the parts of lmms-eval that it touches; docs/harness.md has a real run."""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import lp_patch
from lp_patch.loading import ask

TESTBED = Path(__file__).resolve().parent.parent / "examples" / "testbed"


class Base:
    """Like lmms-eval's llava_hf."""

    is_simple, rank = True, 0

    def __init__(self, pretrained, device=None):
        self.model = LlavaForConditionalGeneration.from_pretrained(pretrained, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.device, self.task_dict = device, {"task": {"split": [{"answer": "bottom left"}, {"answer": "top right"}]}}


@pytest.fixture
def plugin(monkeypatch):
    stand_ins = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": type("lmms", (), {"is_simple": True})},
        "lmms_eval.models": {"get_model": lambda name, force_simple=False: {"llava_hf": Base}[name]},
        "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
        "lmms_eval.utils": {
            "simple_parse_args_string": lambda text: {
                name: int(value) if value.isnumeric() else value
                for name, value in (part.split("=", 1) for part in text.split(","))
            }
        },
    }
    for name, content in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "lp_patch.lmms_eval", raising=False)
    yield importlib.import_module("lp_patch.lmms_eval")
    sys.modules.pop("lp_patch.lmms_eval", None)


def made(plugin, options):
    return plugin.Patched.create_from_arg_string(
        f"base=llava_hf,pretrained={TESTBED / 'model'},{options}", {"device": "cpu", "batch_size": None}
    )


def test_arguments_are_parted(plugin):
    """Ours patch, all others are the base's; what it is not given of its harness is not passed."""
    model = made(plugin, "tokens=32,scorer=cls")
    assert isinstance(model, Base) and model.device == "cpu"
    assert (model.patch.config.tokens, model.patch.config.scorer) == (32, "cls")
    assert lp_patch.is_applied(model.model)
    assert plugin.MANIFEST.model_id == "lp_patch" and not plugin.PatchedChat.is_simple
    with pytest.raises(lp_patch.ConfigError, match="needs base=NAME"):
        plugin.Patched.create_from_arg_string("tokens=32")
    with pytest.raises(TypeError, match="tokns"):  # the base refuses what it does not know
        made(plugin, "tokns=32")


def test_only_the_prompt_asks_and_only_the_answer_is_scored(plugin):
    """What a prompt keeps does not depend on the answer that is scored, and equals what generate() keeps."""
    model = made(plugin, "tokens=32")
    picture, question = Image.open(TESTBED / "demo.png").convert("RGB"), "Where is the apple?"
    inputs = ask(model.processor, picture, question)
    model.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    kept = model.patch.trace.stage2[0].tolist()
    found = []
    for number, target in ((0, "bottom left"), (1, lambda doc: doc["answer"])):
        request = SimpleNamespace(args=(question, target, lambda doc: [picture], number, "task", "split"))
        found += model.loglikelihood([request])
        assert model.patch.trace.stage2[0].tolist() == kept
    (right, said), (wrong, not_said) = found
    assert right < wrong and said and not not_said
    # the loss by hand, of the answer's tokens alone: what follows the prompt that generate() is given
    start = inputs["input_ids"].shape[1]
    more = model.processor.tokenizer(" top right</s>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([inputs["input_ids"], more], dim=1)
    prompt = torch.zeros_like(ids, dtype=torch.bool)
    prompt[:, :start] = True
    with torch.no_grad(), model.patch.asking(prompt):
        logits = model.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
    want = torch.nn.functional.cross_entropy(logits[0, start - 1 : -1], more[0])
    assert wrong == pytest.approx(float(want), rel=1e-4)


def test_refusals(plugin):
    model = made(plugin, "tokens=32")
    with pytest.raises(lp_patch.ConfigError, match="is not at the end of the prompt"):
        plugin._start(model.processor.tokenizer, torch.tensor([[5, 6, 7]]), "no such words")
    with pytest.raises(lp_patch.ConfigError, match="holds no processor"):
        plugin._processor(SimpleNamespace(model=model.model))
