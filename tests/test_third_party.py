"""CONTRIBUTING.md's page, followed to the letter with a model type that is not built in."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from masked import expected
from tiny import EOS, IMAGE, LAYERS, PAD, SIDE, VOCAB, WIDTH, N, batch, images, tokens
from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

import lp_patch
from lp_patch import registry

HERE = Path(__file__).parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (HERE.parent / "CONTRIBUTING.md").read_text(), re.DOTALL)
SHORT, PROJECTED, PROOF = [text for language, text in BLOCKS if language == "python"]
(PYPROJECT,) = [text for language, text in BLOCKS if language == "toml"]
PROMPTS = [(3, "image", 6), (1, "image", 2, "image", 4), (9,)]
NEW = 3


def declared(source):
    """The adapter that a block of the page makes."""
    names = {"Adapter": lp_patch.Adapter}
    exec(source, names)
    return names["ADAPTER"]


@pytest.fixture
def adapters(monkeypatch):
    """A registry of this test's own."""
    lp_patch.supported()
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))
    return registry._adapters


class MyVlmConfig(VipLlavaConfig):
    model_type = "my_vlm"


def tiny_vlm(seed=0):
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=14 * SIDE,
        patch_size=14, projection_dim=WIDTH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip
    config = MyVlmConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layers=[-2, -3, 1]
    )
    model = VipLlavaForConditionalGeneration(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name:
                parameter.normal_(0, 1.0)
            elif parameter.dim() > 1:
                parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None  # random models must not stop at random
    model.generation_config.suppress_tokens = [IMAGE]  # nor speak of pictures
    return model


def scene():
    """A padded batch, and where its images lie: rows -> images -> positions."""
    rows = [tokens(*parts, seed=i) for i, parts in enumerate(PROMPTS)]
    inputs = batch(rows, images(3))
    visual = []
    for row in inputs["input_ids"]:
        at = (row == IMAGE).nonzero().flatten().tolist()
        visual.append([at[start : start + N] for start in range(0, len(at), N)])
    assert [len(x) for x in visual] == [1, 2, 0]
    return inputs, visual


def prove(model):
    """The page's own proof."""
    inputs, visual = scene()
    names = {"model": model, "inputs": inputs, "visual": visual}
    exec(PROOF, names)
    assert names["patch"].trace.visual_tokens == [N, 2 * N, 0]
    assert [len(kept) for kept in names["want"].stage2] == [3, 6, 0]


def test_installed_package_is_found(tmp_path):
    package, target = tmp_path / "package", tmp_path / "target"
    package.mkdir()
    (package / "my_vlm.py").write_text(SHORT)
    (package / "pyproject.toml").write_text(PYPROJECT)
    assert "my_vlm" not in lp_patch.supported()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(target), str(package)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*pip, *options], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    # a fresh process, with the transformers and the lp_patch of this one
    roots = [Path(module.__file__).parent.parent for module in (lp_patch, transformers)]
    paths = os.pathsep.join(map(str, [target, HERE, *roots]))
    code = "import torch, test_third_party as t; torch.set_num_threads(1); t.prove(t.tiny_vlm()); "
    code += "print(t.lp_patch.supported()['my_vlm'])"
    command, env = [sys.executable, "-c", code], {**clean, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "My VLM\n"


def test_registered(adapters):
    model = tiny_vlm(seed=1)
    with pytest.warns(UserWarning, match="nobody has declared the model type 'my_vlm'"), lp_patch.applied(model):
        pass
    lp_patch.register(declared(SHORT))
    assert lp_patch.supported()["my_vlm"] == "My VLM"
    with pytest.raises(lp_patch.ConfigError, match="already has an adapter"):
        lp_patch.register(declared(PROJECTED))
    prove(model)


@torch.no_grad()
def test_projector(adapters):
    """Stage 1 on what the projector would have read: the layers of three features side by side."""
    lp_patch.register(declared(PROJECTED))
    model = tiny_vlm(seed=2)
    decoder = model.model.language_model
    inputs, visual = scene()
    seen, projected = [], []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    first, second, third = seen[0]
    pruner = lp_patch.LearnablePruner(3 * WIDTH, 16).double().eval()
    want = expected(
        model, decoder.layers, decoder, inputs, visual,
        tokens=5, pruner=pruner, features=[[first], [second, third], []],
    )  # fmt: skip
    handle = model.model.multi_modal_projector.register_forward_hook(lambda *call: projected.append(call[2].shape[1]))
    with lp_patch.applied(model, tokens=5, pruner=pruner) as patch:
        got = model(**inputs).logits
    handle.remove()
    assert [kept.tolist() for kept in patch.trace.stage1] == want.stage1
    assert [kept.tolist() for kept in patch.trace.stage2] == want.stage2
    torch.testing.assert_close(got[want.left], want.logits[want.left])
    assert projected == [9]  # of 36: removed tokens were not projected


@torch.no_grad()
@pytest.mark.parametrize("source", [SHORT, PROJECTED], ids=["short", "projector"])
def test_generation_full_budget_and_removal(adapters, source):
    lp_patch.register(declared(source))
    model = tiny_vlm(seed=3)
    decoder = model.model.language_model
    inputs, visual = scene()
    plain = model(**inputs).logits
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    said = model.generate(**inputs, **options).sequences
    with lp_patch.applied(model, ratio=1.0):
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model.generate(**inputs, **options).sequences, said)
    with lp_patch.applied(model, tokens=5):
        out = model.generate(**inputs, **options)
    length = inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
    whole = {**inputs, "input_ids": out.sequences, "attention_mask": mask}
    whole["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    features = None
    if source is PROJECTED:
        seen = []
        handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**inputs)
        handle.remove()
        features = [[seen[0][0]], [seen[0][1], seen[0][2]], []]
    want = expected(model, decoder.layers, decoder, whole, visual, tokens=5, end=length, features=features)
    for step, logits in enumerate(out.logits):
        # generate() hands out float32
        torch.testing.assert_close(logits, want.logits[:, length - 1 + step].float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(model(**inputs).logits, plain)
    assert not lp_patch.is_applied(model)
