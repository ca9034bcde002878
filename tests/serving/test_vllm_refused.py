"""What is refused, where, and in which words. No model is loaded."""

import pytest
from asking import TESTBED
from checkpoints import CONFIGS, save

import lp_patch
import lp_patch.vllm

MODEL = TESTBED / "model"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in CONFIGS}
    for kind, folder in folders.items():
        save(kind, folder)
    return folders


def config_of(folder, **engine):
    """vLLM's config, which is checked when it is made."""
    from vllm.engine.arg_utils import EngineArgs

    given = {"hf_overrides": lp_patch.vllm.overrides(folder, tokens=8, scorer="diversity"), "max_model_len": 200}
    return EngineArgs(str(folder), **{**given, **engine}).create_engine_config()


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallel"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"enable_mm_embeds": True}, "enable_mm_embeds"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"enable_lora": True, "enable_tower_connector_lora": True}, "LoRA on the vision tower"),
        ({"video_pruning_rate": 0.5}, "video_pruning_rate"),
    ],
)
def test_of_the_server(folders, engine, words):
    with pytest.raises(Exception, match=words):
        config_of(folders["qwen2_5_vl"], **engine)


def test_scaled_rope(folders):
    """Positions may pass its table, which cannot be made longer without changing what it says."""
    options = lp_patch.vllm.overrides(folders["llava"], tokens=8, scorer="diversity")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    options["text_config"] = {"rope_parameters": rope, "max_position_embeddings": 512}
    with pytest.raises(Exception, match="limit_mm_per_prompt"):
        config_of(folders["llava"], hf_overrides=options)
    config_of(folders["llava"], hf_overrides=options, limit_mm_per_prompt={"image": 2})


def test_architecture_without_options(folders):
    with pytest.raises(Exception, match=r"lp_patch\.vllm\.overrides"):
        config_of(folders["llava"], hf_overrides={"architectures": ["LpPatchLlavaForConditionalGeneration"]})


def test_without_the_plugin(folders, monkeypatch):
    """vLLM knows no such architecture: nothing is silently served unpruned."""
    import subprocess
    import sys

    code = (
        "import lp_patch.vllm, os; from vllm.engine.arg_utils import EngineArgs;"
        f"EngineArgs({str(folders['llava'])!r}, "
        f"hf_overrides=lp_patch.vllm.overrides({str(folders['llava'])!r}, tokens=8)).create_engine_config()"
    )
    monkeypatch.setenv("VLLM_PLUGINS", "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "LpPatchLlavaForConditionalGeneration" in done.stderr, done.stderr[-2000:]


def test_a_name_that_is_missing(monkeypatch):
    import sys

    from vllm.model_executor.models import interfaces

    monkeypatch.delattr(interfaces, "SupportsMRoPE")
    for name in [x for x in sys.modules if x.startswith("lp_patch.vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(lp_patch.UnsupportedModelError, match="SupportsMRoPE"):
        lp_patch.vllm.register()


def test_encoder_batches(folders):
    """As many pictures are encoded at once as without pruning, though each is planned with fewer tokens."""
    config = config_of(folders["llava"], max_num_batched_tokens=360)
    assert config.scheduler_config.max_num_encoder_input_tokens == 10 * 8  # 36 tokens a picture
