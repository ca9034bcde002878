"""`apply(compile=True)`: a region runs on a CPU as it is, in its buffers: right there, and without a wait for a device.

That a CUDA graph replays it is for `examples/benchmark_gpu.py`, which also compares what is kept.
"""

import pytest
import torch
from counting import Counted
from families import FAMILIES, make
from tiny import V5

import lp_patch
from lp_patch.graphs import Region

pytestmark = [
    pytest.mark.skipif(not V5, reason="tried with the caches of transformers 5"),
    pytest.mark.filterwarnings("ignore:compile=True captures CUDA graphs"),
    pytest.mark.filterwarnings("ignore:compile=True. a forward with visual_pos_masks"),
]
DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe")  # whose decoder layers are not captured: said, not silent
WAITING = ("mistral3",)  # whose tower asks for the pictures' sizes: on a GPU it is not captured, and says so
every = pytest.mark.parametrize("family", [x for x in FAMILIES if x != "llava_llama"])
OPTIONS, CLOSE = {"tokens": 4, "layer": 2}, {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def regions(monkeypatch):
    """What ran in regions, and the waits of each."""
    found, replay = [], Region.replay

    def counted(self, values):
        with Counted() as counter:
            output = replay(self, values)
        found.append(("layers" if "embeds" in values else "encoder", counter))
        return output

    monkeypatch.setattr(Region, "replay", counted)
    return found


@every
@torch.no_grad()
def test_a_prefill_runs_in_regions_that_wait_for_nothing(family, regions):
    """Prompts of one shape share them, each with its own result."""
    scenes = [make(family, torch.float32, (0,), seed=seed) for seed in (40, 41)]
    model = scenes[0][0]
    inputs = [scene.forward() for _, scene in scenes]
    with lp_patch.applied(model, **OPTIONS) as patch:
        want = [(model(**x, use_cache=True), patch.trace) for x in inputs]
    with lp_patch.applied(model, **OPTIONS, compile=True) as patch:
        got = [(model(**x, use_cache=True), patch.trace) for x in inputs]
        assert len(patch._engine.languages.kept) == (family not in DEEPSTACK)
    assert [name for name, _ in regions].count("layers") == (0 if family in DEEPSTACK else len(inputs))
    waits = {name for name, counter in regions if counter.waits}
    assert waits == ({"encoder"} if family in WAITING else set())
    for (out, trace), (plain, plain_trace) in zip(got, want, strict=True):
        torch.testing.assert_close(out.logits, plain.logits, **CLOSE)
        assert [x.tolist() for x in trace.stage2] == [x.tolist() for x in plain_trace.stage2]
        assert [x.tolist() for x in trace.stage1] == [x.tolist() for x in plain_trace.stage1]


@every
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation(family, cache, regions):
    model, scene = make(family, torch.float32, (0,), seed=42)
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    with lp_patch.applied(model, **OPTIONS):
        want = model.generate(**scene.inputs, **options)
    with lp_patch.applied(model, **OPTIONS, compile=True):
        got = model.generate(**scene.inputs, **options)
    assert regions and torch.equal(got, want)


@torch.no_grad()
def test_what_does_not_fit_says_so_once(regions):
    model, scene = make("llava", torch.float32, (0, 1), seed=43)
    with lp_patch.applied(model, **OPTIONS):
        want = model(**scene.forward()).logits
    with lp_patch.applied(model, **OPTIONS, compile=True):
        with pytest.warns(UserWarning, match="several rows is not captured"):
            got = model(**scene.forward()).logits
        torch.testing.assert_close(model(**scene.forward()).logits, got, rtol=0, atol=0)
    torch.testing.assert_close(got, want, **CLOSE)
    assert "forward" not in vars(model.model.language_model)
