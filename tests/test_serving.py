"""The parts of the vLLM plugin that need no vLLM: options, positions, digits. The rest: tests/serving."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lp_patch
import lp_patch.vllm
from lp_patch.vllm.options import KEY, options_of
from lp_patch.vllm.positions import Span, from_digits, prompt_positions, to_digits

MODEL = Path(__file__).parent.parent / "examples" / "testbed" / "model"


def test_overrides_find_the_checkpoints_pruner():
    found = lp_patch.vllm.overrides(MODEL, tokens=64)
    assert found["architectures"] == ["LpPatchLlavaForConditionalGeneration"]
    assert found[KEY]["scorer"] == "learned" and Path(found[KEY]["pruner"]) == MODEL / "lp_patch_pruner"
    assert lp_patch.vllm.overrides(MODEL, tokens=64, scorer="diversity")[KEY]["pruner"] is None
    assert lp_patch.vllm.overrides(MODEL, tokens=64, pruner=MODEL / "lp_patch_pruner") == found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 8, "layer": 3}, "stage 2"),
        ({"tokens": 8, "stage_ratio": 3.0}, "stage 2"),
        ({"tokens": 8, "text_scorer": "last"}, "stage 2"),
        ({"tokens": 8, "final_wipe_layer": 4}, "stage 2"),
        ({"scorer": "none"}, "no stage 2"),
        ({"tokns": 8}, "did you mean 'tokens'"),
        ({"tokens": 0}, "tokens must be an int >= 1"),
        ({"scorer": "cls", "pruner": str(MODEL / "lp_patch_pruner")}, "does not use it"),
        ({"pruner": lp_patch.LearnablePruner(192)}, "save_pretrained"),
        ({"scorer": "hiprune", "diversity": 0.5}, "has no effect"),
    ],
)
def test_overrides_refuse(options, words):
    with pytest.raises(lp_patch.ConfigError, match=words):
        lp_patch.vllm.overrides(MODEL, **options)


def test_overrides_refuse_a_model_without_a_twin(tmp_path):
    from transformers import Qwen2VLConfig

    Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(lp_patch.UnsupportedModelError, match="Qwen2VLForConditionalGeneration"):
        lp_patch.vllm.overrides(tmp_path, tokens=8)


def test_overrides_refuse_what_the_family_does_not_have(tmp_path):
    from transformers import Qwen2_5_VLConfig

    Qwen2_5_VLConfig(architectures=["Qwen2_5_VLForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(lp_patch.ConfigError, match="CLS"):
        lp_patch.vllm.overrides(tmp_path, tokens=8, scorer="cls")


def test_options_are_read_as_written():
    class Config:
        lp_patch = lp_patch.vllm.overrides(MODEL, ratio=0.25, seed=3)[KEY]

    read = options_of(Config, width=192)
    assert (read.config.ratio, read.config.tokens, read.config.seed) == (0.25, None, 3)
    assert read.pruner.hidden_size == 192 and read.scorer.name == "learned"
    assert read.budget(576) == (144, 144) and read.budget(3) == (1, 1) and read.budget(0) == (0, 0)
    with pytest.raises(lp_patch.PrunerError, match="192-wide"):
        options_of(Config, width=64)
    with pytest.raises(lp_patch.ConfigError, match="overrides"):
        options_of(object())


def test_importing_brings_no_vllm():
    code = "import sys, lp_patch, lp_patch.vllm; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


PICTURES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 9)), max_size=4)


@given(PICTURES, st.integers(0, 3))
def test_positions_are_those_of_the_whole_prompt(pictures, after):
    """Against the unpruned prompt, laid out token by token: text, pictures of `advance` tokens each."""
    spans, expected, place, position = [], [], 0, 0
    for text, kept, advance in pictures:
        expected += range(position, position + text)
        place, position = place + text, position + text
        spans.append(Span(place, kept, advance))
        expected += [position] * kept
        place, position = place + kept, position + advance
    expected += range(position, position + after)
    positions, delta = prompt_positions(place + after, spans)
    assert positions.tolist() == expected
    assert place + after + delta == position + after  # of the first generated token


@given(st.lists(st.tuples(st.integers(0, 128**2 - 1), st.integers(0, 128**2 - 1)), min_size=1, max_size=9))
def test_digits_survive_every_dtype(numbers):
    numbers = torch.tensor(numbers)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(from_digits(to_digits(numbers, dtype)), numbers)
