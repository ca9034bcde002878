"""Every family under everything that people do with a model, against the masked oracle.

What a family alone needs, and more options, stand in its own file; `tests/matrix.py` makes the table of docs/modes.md
from both. A cell of it that is no plain yes is what a test here asserts and records.
"""

import copy
import io
import pickle
import re
import warnings
from contextlib import contextmanager

import pytest
import torch
from devices import FIRST, Pretended, put, spread
from families import FAMILIES, Original, make
from test_wrappers import lora
from tiny import ORIGINAL_CANNOT, ORIGINAL_GENERATES

import lp_patch

NEW = 3
OPTIONS = {"tokens": 4, "layer": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}  # norms and rotary angles are float32
LEFT, SEVERAL, ALL = (0,), (1,), (0, 1, 2)
LONG = [pytest.mark.long, pytest.mark.matrix]
every = pytest.mark.parametrize("family", FAMILIES)


def mostly_long(*normal):
    """Every family; all but these in the long tier, and for docs/modes.md's table."""
    return pytest.mark.parametrize("family", [x if x in normal else pytest.param(x, marks=LONG) for x in FAMILIES])


# what a wrapper does depends on how a family is patched: early stage 1, on the output, line breaks, DeepStack, split
# features, a merge of its own
mechanism = mostly_long("llava", "internvl", "llava_next", "qwen3_vl", "idefics3", "llava_llama")


@contextmanager
def refused(record_property, said, why=None):
    """The block must fail with an error of ours that says so; `why` for the table, where that alone is no reason."""
    with pytest.raises(lp_patch.LpPatchError, match=re.escape(said)):
        yield
    record_property("cell", f"refused: {why or said}")


@torch.no_grad()
def forward(model, scene):
    return model(**scene.forward()).logits


def generate(model, scene, **options):
    """What is said, (B, NEW), and its logits, (B, NEW, vocab); None where the model cannot, patched or not."""
    if isinstance(scene, Original) and not ORIGINAL_GENERATES:
        return None
    # a random model would say placeholders, and the oracle read them as such
    mute = {0, *(getattr(model.config, f"{name}_token_id", 0) for name in ("image", "video"))}
    out = model.generate(
        **scene.inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True,
        suppress_tokens=sorted(mute), **options,
    )  # fmt: skip
    return out.sequences[:, -NEW:], torch.stack(out.logits, dim=1)


def difference(got, want):
    """The largest one, after a check that it is small."""
    torch.testing.assert_close(got, want.to(got.dtype), **CLOSE)
    return float((got - want.to(got.dtype)).abs().max())


def check_forward(logits, scene, model, **options):
    """The logits of a patched forward against the oracle on the unpatched model."""
    want = scene.want(model, **{**OPTIONS, **options})
    assert logits.shape == want.logits.shape
    return difference(logits[want.left], want.logits[want.left])


def check_generate(found, scene, model, **options):
    """Each step's logits against the oracle on what was said until then; the largest difference, if any was made."""
    if found is None:
        return None
    new, steps = found
    return difference(steps, scene.want(model, new, **{**OPTIONS, **options}).logits[:, -NEW - 1 : -1])


def compare(family, which, dtype, attention, seed):
    """A patched forward: the sets, the logits and the removal; the largest difference."""
    model, scene = make(family, dtype, which, seed=seed, attention=attention)
    want, plain = scene.want(model, **OPTIONS), forward(model, scene)
    with lp_patch.applied(model, **OPTIONS) as patch:
        logits = forward(model, scene)
    assert [[x.tolist() for x in kept] for kept in (patch.trace.stage1, patch.trace.stage2)] == [
        want.stage1, want.stage2
    ]  # fmt: skip
    assert not torch.allclose(logits, plain, rtol=0, atol=0.1)
    assert torch.equal(forward(model, scene), plain)
    return check_forward(logits, scene, model)


@every
def test_forward(family, record_property):
    record_property("difference", compare(family, LEFT, torch.float64, "sdpa", seed=10))


@every
def test_several_inputs(family, record_property):
    record_property("difference", compare(family, SEVERAL, torch.float64, "sdpa", seed=11))


@every
def test_padded_batch(family, record_property):
    record_property("difference", compare(family, ALL, torch.float64, "sdpa", seed=12))


@every
def test_eager(family, record_property):
    # transformers' eager softmax runs in float32, where a fully masked float64 row is NaN, patched or not
    record_property("difference", compare(family, ALL, torch.float32, "eager", seed=13))


@every
def test_generate(family, record_property):
    model, scene = make(family, seed=14)
    with lp_patch.applied(model, **OPTIONS):
        found = generate(model, scene)
    if found is None:
        record_property("cell", ORIGINAL_CANNOT)
    else:
        record_property("difference", check_generate(found, scene, model))


@every
def test_compact_positions(family, record_property):
    model, scene = make(family, seed=15)
    options = {**OPTIONS, "positions": "compact"}
    if family.startswith("qwen"):
        with refused(record_property, 'positions="compact" has no meaning for the several axes of position ids'):
            lp_patch.apply(model, **options)
        return
    with lp_patch.applied(model, **options):
        logits, found = forward(model, scene), generate(model, scene)
    check_forward(logits, scene, model, **options)
    check_generate(found, scene, model, **options)


@pytest.mark.parametrize("family", [x for x in FAMILIES if x not in ("llava", "llava_llama")])
def test_cls_is_refused(family, record_property):
    model, _ = make(family)
    with refused(record_property, "scorer='cls' needs a [CLS] token that ranks the visual tokens one to one"):
        lp_patch.apply(model, scorer="cls")


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(family, dtype):
    """Numbers stay finite, and what is kept is nearly what float64 keeps."""
    model, scene = make(family, dtype, seed=16)
    with lp_patch.applied(model, **OPTIONS) as patch:
        found = generate(model, scene)
        logits = forward(model, scene)
    assert logits.dtype == dtype and logits.isfinite().all() and (found is None or found[1].isfinite().all())
    assert all(scores.dtype == torch.float32 for scores in patch.trace.stage2_scores[:2])
    _, scene = make(family, seed=16)
    for kept, want in zip(patch.trace.stage1, scene.want(model.double(), **OPTIONS).stage1, strict=True):
        assert len(kept) == len(want) and len(set(kept.tolist()) & set(want)) >= 0.7 * len(want)


@every
def test_static_cache(family, record_property):
    model, scene = make(family, seed=17)
    with lp_patch.applied(model, **OPTIONS):
        found = generate(model, scene, cache_implementation="static")
    if found is None:
        record_property("cell", ORIGINAL_CANNOT)
    check_generate(found, scene, model)


@mechanism
@pytest.mark.parametrize("order", ["patch first", "peft first"])
def test_peft(family, order):
    model, scene = make(family, seed=18)
    if order == "patch first":
        lp_patch.apply(model, **OPTIONS)
    wrapped = lora(model)
    if order == "peft first":
        lp_patch.apply(wrapped, **OPTIONS)
    tuned = forward(wrapped, scene), generate(wrapped, scene)
    with wrapped.disable_adapter():
        plain = forward(wrapped, scene), generate(wrapped, scene)
        lp_patch.remove(wrapped)
        assert not lp_patch.is_applied(model)
        check_forward(plain[0], scene, model)
        check_generate(plain[1], scene, model)
    assert not torch.allclose(tuned[0], plain[0])
    merged = wrapped.merge_and_unload()
    check_forward(tuned[0], scene, merged)
    check_generate(tuned[1], scene, merged)


@pytest.fixture
def process_group(tmp_path):
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@mechanism
def test_ddp(family, process_group):
    model, scene = make(family, seed=19)
    with lp_patch.applied(torch.nn.parallel.DistributedDataParallel(model), **OPTIONS) as patch:
        logits = forward(torch.nn.parallel.DistributedDataParallel(model), scene)
    assert not patch.active and not lp_patch.is_applied(model)
    check_forward(logits, scene, model)


def shard(model, world):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    for module in [*model.get_decoder().layers, model]:
        fully_shard(module, mesh=mesh)


@mechanism
@pytest.mark.parametrize("order", ["patch first", "shard first"])
def test_fsdp2(family, order, process_group):
    model, scene = make(family, seed=20)
    plain = copy.deepcopy(model)
    if order == "patch first":
        lp_patch.apply(model, **OPTIONS)
    shard(model, 1)
    if order == "shard first":
        lp_patch.apply(model, **OPTIONS)
    logits = forward(model, scene)
    lp_patch.remove(model)
    assert not lp_patch.is_applied(model)
    check_forward(logits, scene, plain)


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=LONG)])
def test_two_processes(family, tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (family, str(tmp_path / "store")), nprocs=2)


def _one_of_two(rank, family, store):
    """DDP and FSDP2, each process with rows of its own."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, scene = make(family, which=[LEFT, ALL][rank], seed=21)
    plain = copy.deepcopy(model)
    with lp_patch.applied(model, **OPTIONS):
        logits = forward(torch.nn.parallel.DistributedDataParallel(model), scene)
        check_forward(logits, scene, plain)
        shard(model, 2)
        check_forward(forward(model, scene), scene, plain)
    dist.barrier()
    dist.destroy_process_group()


@mechanism
def test_a_later_wrapper_outlives_the_patch(family):
    """What somebody put around a method that we wrapped stays theirs; ours goes from under it."""
    model, scene = make(family, dtype=torch.float32, which=SEVERAL)
    base = lp_patch.registry.find_parts(model).base
    encode = lp_patch.registry.find_parts(model).modalities[0].encode
    calls = []

    def logits(through=True):
        calls.clear()
        with torch.no_grad():
            found = model(**scene.forward()).logits
        assert bool(calls) == through
        return found

    plain = logits(through=False)
    lp_patch.apply(model, tokens=4, layer=2)
    ours = getattr(base, encode)

    def theirs(*args, **kwargs):
        calls.append(1)
        return ours(*args, **kwargs)

    setattr(base, encode, theirs)
    assert not torch.equal(logits(), plain)
    with pytest.warns(UserWarning, match=f"{type(base).__name__}.{encode} was wrapped or replaced after lp_patch"):
        lp_patch.remove(model)
    assert not lp_patch.is_applied(model)
    assert getattr(base, encode) is theirs
    assert torch.equal(logits(), plain)
    # a new patch goes around theirs, and off again
    with lp_patch.applied(model, tokens=4, layer=2):
        assert not torch.equal(logits(), plain)
    assert getattr(base, encode) is theirs
    assert torch.equal(logits(), plain)
    # they take their own away
    setattr(base, encode, ours)
    with lp_patch.applied(model, tokens=4, layer=2):
        assert not torch.equal(logits(through=False), plain)
    assert torch.equal(logits(through=False), plain)


TELLING = {"llava", "llava_next", "video_llava", "internvl"}  # their configs say how many tokens a picture has at least


@every
def test_a_budget_that_no_picture_could_keep_to_is_refused_at_apply(family):
    model, scene = make(family, dtype=torch.float32, which=(1,))
    parts = lp_patch.registry.find_parts(model)
    fewest = parts.adapter.fewest and parts.adapter.fewest(parts.model.config)
    assert (fewest is not None) == (family in TELLING)
    options = {"scorer": "none", "layer": len(parts.layers) - 1}
    if fewest is None:
        with lp_patch.applied(model, tokens=1, **options):
            return
    assert fewest <= min(len(x) for row in scene.visual for x in row)
    used_up = options["layer"] * fewest // len(parts.layers)
    with pytest.raises(lp_patch.ConfigError, match=rf"\(tokens={used_up + 1} for an input of {fewest}\)"):
        lp_patch.apply(model, tokens=used_up, **options)
    assert not lp_patch.is_applied(model)
    with lp_patch.applied(model, tokens=used_up + 1, **options), lp_patch.applied(model, tokens=1):
        pass


@mostly_long()  # tests/test_wrappers.py and tests/test_lifecycle.py compile LLaVA
def test_compile(family):
    model, scene = make(family, torch.float32, seed=22)
    plain, inputs = forward(model, scene), scene.forward()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, plain, **CLOSE)
        with lp_patch.applied(compiled, **OPTIONS):
            logits = compiled(**inputs).logits
        torch.testing.assert_close(compiled(**inputs).logits, plain, **CLOSE)
    check_forward(logits, scene, model)


@mechanism
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # llava-torch freezes its tower
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family, reentrant):
    model, scene = make(family, seed=23)
    inputs, found = scene.forward(), []
    model.train()
    with lp_patch.applied(model, **OPTIONS):
        for checkpointed in (False, True):
            if checkpointed:
                model.activation_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            model.zero_grad()
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
            found.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
    assert any("layers.5." in name for name in found[0])
    torch.testing.assert_close(found[1], found[0])


@mechanism
@pytest.mark.parametrize("order", ["patch first", "dispatch first"])
def test_device_map(family, order, tmp_path):
    """accelerate's map, with every second leaf module on disk."""
    from accelerate import dispatch_model

    model, scene = make(family, seed=24)
    plain = copy.deepcopy(model)
    places = dict.fromkeys(name.rpartition(".")[0] for name in model.state_dict())
    for i, name in enumerate(places):
        places[name] = "disk" if i % 2 and not list(model.get_submodule(name).children()) else "cpu"
    if order == "patch first":
        lp_patch.apply(model, **OPTIONS)
    dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert {x.device.type for x in model.get_decoder().parameters()} == {"cpu", "meta"}
    if order == "dispatch first":
        lp_patch.apply(model, **OPTIONS)
    logits, found = forward(model, scene), generate(model, scene)
    lp_patch.remove(model)
    assert not lp_patch.is_applied(model)
    check_forward(logits, scene, plain)
    check_generate(found, scene, plain)


@mostly_long("llava", "qwen3_vl")
def test_two_devices(family):
    """Decoder layers on another device: from the one that stage 2 reads, from the one it cuts before, from a later."""
    for first in (1, 2, 3):
        model, scene = make(family, seed=29)
        want = scene.want(model, **OPTIONS)
        spread(model, model.get_decoder().layers, first)
        scene.inputs = {name: put(x.clone(), FIRST) for name, x in scene.inputs.items()}
        with lp_patch.applied(model, **OPTIONS) as patch, Pretended():
            logits, found = forward(model, scene), generate(model, scene)
        assert patch.trace.stage1[0].tolist() == want.stage1[0]
        plain, scene = make(family, seed=29)
        check_forward(logits, scene, plain)
        check_generate(found, scene, plain)


@mechanism
@pytest.mark.parametrize("order", ["patch first", "offload first"])
def test_all_weights_offloaded(family, order, record_property):
    from accelerate import cpu_offload

    model, scene = make(family, seed=25)
    plain = copy.deepcopy(model)
    if family in ("llava_llama", "llava_next", "llava_next_video", "llava_onevision", "idefics3"):
        cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            generate(model, scene) or forward(model, scene)
        record_property("cell", "not applicable: unpatched, it reads weights that accelerate has put away")
        return
    if order == "patch first":
        lp_patch.apply(model, **OPTIONS)
    cpu_offload(model, execution_device=torch.device("cpu"))
    if order == "offload first":
        lp_patch.apply(model, **OPTIONS)
    logits, found = forward(model, scene), generate(model, scene)
    lp_patch.remove(model)
    check_forward(logits, scene, plain)
    check_generate(found, scene, plain)


@mechanism
def test_trainer(family, tmp_path):
    from transformers import Trainer, TrainingArguments

    model, scene = make(family, torch.float32, seed=26)
    rows = {**scene.forward(), "labels": scene.forward()["input_ids"]}
    lp_patch.apply(model, **OPTIONS)
    want = model.train()(**rows).loss.item()
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        result = Trainer(model, arguments, train_dataset=[rows], data_collator=lambda x: x[0]).train()
    assert result.training_loss == pytest.approx(want, rel=1e-4)
    assert model(**rows).loss.item() < want  # it learnt


@mechanism
def test_copies(family):
    model, scene = make(family, seed=27)
    plain = copy.deepcopy(model)
    lp_patch.apply(model, **OPTIONS)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    twins = [pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    logits = forward(model, scene)
    twins.append(copy.deepcopy(model))
    lp_patch.remove(model)
    check_forward(logits, scene, plain)
    for twin in twins:
        assert lp_patch.is_applied(twin)
        assert torch.equal(forward(twin, scene), logits)
        lp_patch.remove(twin)
        assert not lp_patch.is_applied(twin)


@mechanism
def test_saved_models_load_unpatched(family, tmp_path):
    model, scene = make(family, torch.float32, seed=28)
    plain = forward(model, scene)
    with lp_patch.applied(model, **OPTIONS):
        model.save_pretrained(tmp_path)
    assert not [x for x in tmp_path.glob("*.json") if "lp_patch" in x.read_text()]
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not lp_patch.is_applied(loaded)
    if family == "llava_llama":  # the package loads its tower from where it came
        loaded.get_vision_tower().load_model()
        loaded.get_vision_tower().load_state_dict(model.get_vision_tower().state_dict())
    torch.testing.assert_close(forward(loaded, scene), plain)
