"""What people put around a model: PEFT, DDP, compile, checkpointing, offloading, other attention back-ends, dtypes."""

import copy
import warnings

import pytest
import torch
from oracle import expected, generated
from test_forward import make_pruner
from tiny import N, batch, images, tiny_llava, tokens
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence

import lp_patch

CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
IDS = tokens(3, "image", 9)
ROWS = [IDS, tokens(2, "image", 4, "image", 3, seed=1)]


def answer(model, dtype=torch.float64, count=5):
    return model.generate(**batch([IDS], images(1, dtype=dtype)), max_new_tokens=count, do_sample=False)[
        0, len(IDS) :
    ].tolist()


def lora(model, seed=0, **options):
    """The model inside PEFT, with adapter weights that change its answers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return wrapped.eval()


@pytest.mark.parametrize("order", ["patch first", "peft first"])
@pytest.mark.parametrize("scorer", ["diversity", "cls"])
def test_peft(order, scorer):
    model = tiny_llava(seed=30)
    plain = generated(model, IDS, images(1), 5, tokens=5, scorer=scorer)
    if order == "patch first":
        lp_patch.apply(model, tokens=5, scorer=scorer)
        wrapped = lora(model)
    else:
        wrapped = lora(model)
        lp_patch.apply(wrapped, tokens=5, scorer=scorer)
    assert lp_patch.is_applied(wrapped) and lp_patch.is_applied(wrapped.get_base_model())
    tuned = answer(wrapped)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    lp_patch.remove(merged)
    # the oracle reads the merged weights
    assert tuned == generated(merged, IDS, images(1), 5, tokens=5, scorer=scorer)
    assert tuned != plain
    with wrapped.disable_adapter():
        assert answer(wrapped) == plain
    if order == "peft first":
        lp_patch.remove(wrapped)
        assert not lp_patch.is_applied(model)
    else:
        back = wrapped.unload()
        assert answer(back) == plain
        lp_patch.remove(back)
        assert not lp_patch.is_applied(back)


def test_peft_modules_to_save_in_the_projector():
    model = tiny_llava(seed=31)
    wrapped = lora(model, modules_to_save=["multi_modal_projector"])
    with lp_patch.applied(wrapped, tokens=5) as patch:
        got = answer(wrapped)
        assert len(patch.trace.stage1[0]) == 9
    merged = wrapped.merge_and_unload()
    assert got == generated(merged, IDS, images(1), 5, tokens=5)


def test_peft_patch_then_modules_to_save():
    model = tiny_llava(seed=31)
    patch = lp_patch.apply(model, tokens=5)
    wrapped = lora(model, modules_to_save=["multi_modal_projector"])
    hooks = [h for m in wrapped.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    owners = {id(o) for h in hooks if (o := getattr(getattr(h, "func", h), "__self__", None)) is not None}
    assert id(patch._engine) in owners and len(owners) == 1, "the copied projector carries a copy of the model"
    got = answer(wrapped)
    assert patch.trace.stage1[0].tolist() == expected(model, IDS, images(1), tokens=5).stage1
    lp_patch.remove(wrapped)
    assert not [
        h for m in wrapped.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        if "lp_patch" in repr(h)
    ]  # fmt: skip
    merged = wrapped.merge_and_unload()
    assert got == generated(merged, IDS, images(1), 5, tokens=5)


def test_ddp(tmp_path):
    model = tiny_llava(seed=32)
    want = expected(model, IDS, images(1), tokens=5).logits
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with lp_patch.applied(wrapped, tokens=5):
            torch.testing.assert_close(wrapped(**batch([IDS], images(1))).logits[0], want, **CLOSE)
        assert not lp_patch.is_applied(model)
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_module_patched_before_and_after():
    model = tiny_llava(seed=33, dtype=torch.float32, layers=3)
    inputs = batch([IDS], images(1, dtype=torch.float32))
    want = expected(model, IDS, images(1, dtype=torch.float32), tokens=5).logits
    with torch.no_grad():
        plain = model(**inputs).logits
        compiled = torch.compile(model, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(**inputs).logits, plain, **CLOSE)
        with lp_patch.applied(compiled, tokens=5):
            torch.testing.assert_close(compiled(**inputs).logits[0], want, **CLOSE)
        torch.testing.assert_close(compiled(**inputs).logits, plain, **CLOSE)
        lp_patch.apply(model, tokens=5)
        again = torch.compile(model, backend="eager", dynamic=False)
        torch.testing.assert_close(again(**inputs).logits[0], want, **CLOSE)
        assert answer(again, torch.float32) == answer(model, torch.float32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = tiny_llava(seed=34)
    inputs = {**batch([IDS], images(1)), "labels": torch.tensor([IDS])}
    model.train()
    with lp_patch.applied(model, tokens=5):
        model(**inputs).loss.backward()
        want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        # renamed in 5.x
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        model(**inputs, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if "vision" not in name and name in want:
            torch.testing.assert_close(parameter.grad, want[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore:You are calling .generate")  # 5.17 takes the model to be on meta
@pytest.mark.parametrize("where", ["meta", "disk"])
@pytest.mark.parametrize("order", ["patch first", "offload first"])
def test_accelerate_offloading(where, order, tmp_path):
    from accelerate import cpu_offload, disk_offload

    model = tiny_llava(seed=35)
    want = generated(model, IDS, images(1), 5, tokens=5, scorer="cls")

    def offload():
        if where == "meta":
            cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))

    if order == "patch first":
        lp_patch.apply(model, tokens=5, scorer="cls")
        offload()
    else:
        offload()
        lp_patch.apply(model, tokens=5, scorer="cls")
    assert next(model.model.language_model.layers[0].parameters()).device.type == "meta"
    assert answer(model) == want
    lp_patch.remove(model)
    assert not lp_patch.is_applied(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scorer", ["diversity", "cls", "learned"])
def test_low_precision(dtype, scorer):
    """Scores are float32, and what is kept is nearly what float64 keeps."""
    model = tiny_llava(seed=36, dtype=dtype)
    inputs = batch([IDS], images(1, dtype=dtype))
    pruner = make_pruner() if scorer == "learned" else None
    with lp_patch.applied(model, tokens=9, scorer=scorer, pruner=pruner) as patch, torch.no_grad():
        out = model(**inputs)
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.logits.dtype == dtype and out.logits.isfinite().all()
    assert patch.trace.stage2_scores[0].dtype == torch.float32
    if scorer != "diversity":
        assert patch.trace.stage1_scores[0].dtype == torch.float32
    want = expected(model.double(), IDS, images(1), tokens=9, scorer=scorer, pruner=pruner)
    assert len(set(patch.trace.stage1[0].tolist()) & set(want.stage1)) >= 0.7 * len(want.stage1)


@pytest.fixture
def flash():
    """A stand-in for FlashAttention: 2-D masks and position ids as transformers hands them over, checked."""
    seen = []

    def attention(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
        seen.append((query.shape[2], key.shape[2], position_ids))
        assert not _is_packed_sequence(position_ids, query.shape[0]), f"gaps in {position_ids}"
        if position_ids is not None and query.shape[2] > 1:
            assert position_ids.shape[-1] == query.shape[2], "position ids of another length"
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        if attention_mask is not None:
            assert attention_mask.dim() == 2 and attention_mask.shape[1] == key.shape[2], "mask of another length"
            mask = mask & attention_mask.bool()[:, None, None, :]
            mask = mask | ~mask.any(-1, keepdim=True)
        groups = query.shape[1] // key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), mask, scale=scaling
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("flash_probe", attention)
    AttentionMaskInterface.register("flash_probe", flash_attention_mask)
    yield seen
    AttentionInterface._global_mapping.pop("flash_probe")
    AttentionMaskInterface._global_mapping.pop("flash_probe")


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_flash_attention_is_never_shown_a_gap(flash, rows, positions):
    model = tiny_llava(seed=37, kv_heads=2)
    model.model.language_model.config._attn_implementation_internal = "flash_probe"
    own = [images(1), images(2, seed=1)][:rows]
    inputs = batch(ROWS[:rows], torch.cat(own))
    with lp_patch.applied(model, tokens=5, positions=positions):
        out = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    model.model.language_model.config._attn_implementation_internal = "sdpa"
    width = inputs["input_ids"].shape[1]
    for row in range(rows):
        new = out.sequences[row, width:].tolist()
        want = expected(model, ROWS[row] + new, own[row], turns=[len(ROWS[row])], tokens=5, positions=positions).logits
        for step, logits in enumerate(out.logits):
            torch.testing.assert_close(logits[row], want[len(ROWS[row]) - 1 + step], **CLOSE)
    assert len({(q, k) for q, k, _ in flash if q > 1}) == 2  # stage 1, stage 2
    assert max(k for _, k, _ in flash) < N


@pytest.mark.long
@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch and transformers warn of themselves
def test_flex_attention():
    """Its forward; in generation, torch's C++ code for masks of a growing length does not compile, patched or not."""
    model = tiny_llava(seed=41, dtype=torch.float32)
    pixels = images(3, dtype=torch.float32)
    inputs = batch(ROWS, pixels)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    want = [expected(model, ids, own, tokens=5) for ids, own in zip(ROWS, pixels.split([1, 2]), strict=True)]
    model.set_attn_implementation("flex_attention")
    with lp_patch.applied(model, tokens=5) as patch, torch.no_grad():
        logits = model(**inputs).logits
    for row, right in enumerate(want):
        assert patch.trace.stage2[row].tolist() == right.stage2
        torch.testing.assert_close(logits[row][inputs["attention_mask"][row].bool()], right.logits, **CLOSE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches_need_cuda(cache):
    model = tiny_llava(seed=42)
    for patched in (False, True):
        if patched:
            lp_patch.apply(model, tokens=5)
        # the static one of transformers 4 fails sooner, patched or not
        said = r"Torch not compiled with CUDA enabled|max_batch_size"
        with pytest.raises((AssertionError, AttributeError), match=said):
            model.generate(**batch([IDS], images(1)), max_new_tokens=2, cache_implementation=cache)


def test_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_llava(seed=38, dtype=torch.float32)
    lp_patch.apply(model, tokens=5)

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            pixels = images(1, seed=i, dtype=torch.float32)[0]
            return {"input_ids": torch.tensor(IDS), "labels": torch.tensor(IDS), "pixel_values": pixels}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_steps=2
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        result = Trainer(model=model, args=arguments, train_dataset=Data()).train()
    assert result.training_loss > 0
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-2")
    assert not lp_patch.is_applied(loaded)
    lp_patch.remove(model)
    with torch.no_grad():
        inputs = batch([IDS], images(1, dtype=torch.float32))
        torch.testing.assert_close(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("order", ["patch first", "shard first"])
@pytest.mark.parametrize("world", [1, 2])
def test_fsdp2(world, order, tmp_path):
    """Sharded over gloo processes, and patched before or after: the oracle's answers, and a clean removal."""
    arguments = (world, order, str(tmp_path / "store"))
    if world == 1:
        _fsdp2_rank(0, *arguments)
    else:
        torch.multiprocessing.spawn(_fsdp2_rank, arguments, nprocs=world)


def _fsdp2_rank(rank, world, order, store):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = tiny_llava(seed=39)
    want = expected(model, IDS, images(1), tokens=5).logits
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))

    def shard():
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    if order == "patch first":
        lp_patch.apply(model, tokens=5)
        shard()
    else:
        shard()
        lp_patch.apply(model, tokens=5)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch([IDS], images(1))).logits[0], want, **CLOSE)
    lp_patch.remove(model)
    assert not lp_patch.is_applied(model)
    dist.barrier()  # a process that leaves early takes the others' connections with it
    dist.destroy_process_group()


def test_bitsandbytes_4_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # its kernels want wide layers
    tiny_llava(seed=40, dtype=torch.float32, hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    skip = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    four_bit = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes and torch talk about their own future
        model = type(tiny_llava()).from_pretrained(tmp_path, quantization_config=four_bit, dtype=torch.float32).eval()
        assert "Linear4bit" in type(model.model.language_model.layers[0].self_attn.q_proj).__name__
        inputs = batch([IDS], images(1, dtype=torch.float32))
        with torch.no_grad():
            plain = model(**inputs).logits
            with lp_patch.applied(model, tokens=5, scorer="cls") as patch:
                model.generate(**inputs, max_new_tokens=3, do_sample=False)
                got = model(**inputs).logits
                kept = len(patch.trace.stage1[0]), len(patch.trace.stage2[0])
                assert patch.report().flops_ratio < 0.5
            assert kept == (9, 3)
            assert got.shape == plain.shape and got.isfinite().all() and not torch.equal(got, plain)
            assert torch.equal(model(**inputs).logits, plain)


def test_pipeline_with_the_trained_testbed():
    """`pipeline("image-text-to-text")` around a patched model answers as generate() does."""
    from pathlib import Path

    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline

    folder = Path(__file__).parent.parent / "examples" / "testbed"
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder / "model")
    picture = Image.open(sorted((folder / "evaluation").rglob("*.webp"))[0]).convert("RGB")
    text = "USER: <image>\nHow many cats are there? ASSISTANT:"
    with lp_patch.applied(model, tokens=64) as patch:
        inputs = processor(images=picture, text=text, return_tensors="pt")
        want = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        out = pipe(text=text, images=picture, return_full_text=False, generate_kwargs={"max_new_tokens": 3})
        assert [len(x) for x in (patch.trace.stage1[0], patch.trace.stage2[0])] == [117, 39]
    assert out[0]["generated_text"].strip() == processor.decode(want, skip_special_tokens=True).strip()
