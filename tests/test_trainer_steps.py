"""PrunerTrainer's steps on a tiny model: in parts, on devices, with data that teach nothing; evaluation and files."""

import os

import pytest
import torch
from safetensors.torch import load_file
from test_gate import halving
from tiny import WIDTH, N, batch, images, tiny_llava, tokens
from transformers import TrainerCallback

from lp_patch import ConfigError, UnsupportedInputError
from lp_patch.training import GatedModel, PrunerTrainer, training_arguments

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
OPTIONS = {"weight": 5.0, "tau": 0.1}


def samples(count, seed=0, images_each=lambda number: 1 + number % 2):
    """Prompts with one or two images, each with another number of labels."""
    made = []
    for number in range(count):
        parts = [part for i in range(images_each(number)) for part in (3 + i, "image")]
        ids = tokens(*parts, 4 + 3 * (number % 3), seed=seed + number)
        made.append({"ids": ids, "pixels": images(ids.count(1) // N, seed=seed + number), "labelled": 3 + number % 4})
    return made


def collate(chosen):
    """A collator of somebody's own: labels on the last tokens, none for a sample that is mute."""
    made = batch([x["ids"] for x in chosen], torch.cat([x["pixels"] for x in chosen]), side="right")
    made["labels"] = torch.full_like(made["input_ids"], -100)
    for row, x in enumerate(chosen):
        if not x.get("mute"):
            last = slice(len(x["ids"]) - x["labelled"], len(x["ids"]))
            made["labels"][row, last] = made["input_ids"][row, last]
    return made


def without_labels(chosen):
    return {key: value for key, value in collate(chosen).items() if key != "labels"}


def gated(lora=False, seed=0, **options):
    model = tiny_llava(seed=0, layers=2).requires_grad_(False)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).double()
    return GatedModel(model, halving(WIDTH, seed), **{**OPTIONS, **options})


def trainer(folder, data, model=None, collator=collate, evaluated=None, callbacks=None, **options):
    settings = {
        "max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "dataloader_pin_memory": False,
    }  # fmt: skip
    return PrunerTrainer(
        gated() if model is None else model, training_arguments(folder, **{**settings, **options}),
        train_dataset=data, eval_dataset=evaluated, data_collator=collator, callbacks=callbacks,
    )  # fmt: skip


class Gradients(TrainerCallback):
    """Those that the first step takes."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if not hasattr(self, "found"):
            self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(job):
    """The first step's gradients, and training's logs."""
    seen = Gradients()
    job.add_callback(seen)
    job.train()
    return seen.found, [log for log in job.state.log_history if "loss" in log]


# ------------------------------------------------------------------ a step


@pytest.mark.parametrize("kind", ["ntp", "distill", "lora, checkpointed"])
def test_accumulation_is_a_larger_batch(tmp_path, kind):
    options = {"objective": "distill"} if kind == "distill" else {"lora": kind.startswith("lora")}

    def run(parts):
        model = gated(**options)
        if kind.startswith("lora"):
            model.activation_checkpointing_enable()
        sizes = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
        return trained(trainer(tmp_path, samples(4), model, **sizes))

    want, (log,) = run(1)
    # older transformers round the loss that they log
    assert log["loss"] == pytest.approx(log["task_loss"] + log["budget_loss"], abs=1e-4)
    assert log["budget_loss"] == pytest.approx(5 * (log["kept"] - 0.1) ** 2, abs=1e-5)
    alone = gated(**options)
    out = alone(**collate(samples(4)))
    out.loss.backward()
    assert log["kept"] == pytest.approx(float(out.kept), abs=1e-6)
    for name, p in alone.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(want[name], p.grad, rtol=1e-5, atol=1e-7)
    for parts in (2, 4):
        got, (other,) = run(parts)
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-7)
        for name in ("task_loss", "budget_loss", "kept"):
            assert other[name] == pytest.approx(log[name], abs=1e-5), name
        assert other["loss"] == pytest.approx(log["loss"], abs=1e-4)


def test_without_labels_the_budget_is_still_the_steps(tmp_path):
    def run(parts):
        sizes = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
        return trained(trainer(tmp_path, samples(4), gated(objective="distill"), without_labels, **sizes))[1][0]

    want, got = run(1), run(4)
    for name in ("budget_loss", "kept"):
        assert got[name] == pytest.approx(want[name], abs=1e-5), name
    assert got["loss"] == pytest.approx(got["task_loss"] + got["budget_loss"], abs=1e-4)


def test_a_broken_step_leaves_nothing_behind(tmp_path):
    """As after running out of memory with auto_find_batch_size."""
    data = samples(4)
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    want, _ = trained(trainer(tmp_path, data, **sizes))
    job = trainer(tmp_path, data, **sizes)
    forward, calls = job.model.forward, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("broken")
        return forward(*args, **kwargs)

    job.model.forward = failing
    with pytest.raises(RuntimeError, match="broken"):
        job.train()
    job.model.zero_grad()
    got, _ = trained(job)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-8)


def test_a_loss_that_is_not_finite_does_not_train(tmp_path):
    data = samples(2)
    data[1]["pixels"][:] = torch.nan
    job = trainer(tmp_path, data, max_steps=2, per_device_train_batch_size=1)
    with pytest.raises(UnsupportedInputError, match="the loss is nan"):
        job.train()
    assert all(p.isfinite().all() for p in job.model.pruner.parameters())


# ------------------------------------------------------------------ what nothing can be learned from


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_batch_that_teaches_nothing_is_replaced_by_the_one_before_and_counted(tmp_path, place):
    data = samples(4)
    known = [collate([x])["input_ids"].tolist() for x in data]

    def run():
        job = trainer(tmp_path, data, max_steps=4, per_device_train_batch_size=1)
        order, forward = [], job.model.forward
        job.model.forward = lambda **given: order.append(known.index(given["input_ids"].tolist())) or forward(**given)
        job.train()
        return job, order

    _, order = run()
    data[order[place]]["mute"] = True
    with pytest.warns(UserWarning, match="1 samples were left out of training, here a sample without a label"):
        job, found = run()
    # the first of all has none before it, but others to take
    order[place] = order[place - 1] if place else min(order[1:])
    assert found == order
    assert job.skipped == 1 == job.state.log_history[-1]["skipped"]
    assert [log["skipped"] for log in job.state.log_history][-2:] == [1, 1]


def test_data_that_teach_nothing_are_refused(tmp_path):
    data = [{**x, "mute": True} for x in samples(4)]
    with pytest.raises(UnsupportedInputError, match="nothing can be learned from these data: a sample without a label"):
        trainer(tmp_path, data).train()
    with pytest.raises(UnsupportedInputError, match="these data: X: gone"):
        trainer(tmp_path, data, collator=lambda chosen: {"skipped": ["X: gone"] * len(chosen)}).train()


def test_what_was_left_out_is_counted_on_after_an_interruption(tmp_path):
    data = [{**x, "mute": number == 1} for number, x in enumerate(samples(4))]
    options = {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 4}
    with pytest.warns(UserWarning, match="1 samples were left out"):
        trainer(tmp_path, data, max_steps=4, **options).train()
    again = trainer(tmp_path, data, max_steps=8, **options)
    with pytest.warns(UserWarning, match="2 samples were left out"):
        again.train(resume_from_checkpoint=True)
    assert again.skipped == 2


def test_what_the_collator_leaves_out_comes_from_other_processes(tmp_path):
    def naming(chosen):
        kept = [x for x in chosen if not x.get("mute")]
        return {**(collate(kept) if kept else {}), "skipped": ["X: gone"] * (len(chosen) - len(kept))}

    data = [{**x, "mute": number in (1, 2)} for number, x in enumerate(samples(8))]
    job = trainer(tmp_path, data, collator=naming, max_steps=4, per_device_train_batch_size=2, dataloader_num_workers=1)
    with pytest.warns(UserWarning, match="2 samples were left out of training, here X: gone; X: gone"):
        job.train()
    assert job.skipped == 2


# ------------------------------------------------------------------ evaluation


def test_evaluation_is_apart_and_of_its_data_as_a_whole(tmp_path):
    data, other = samples(4), samples(5, seed=50)
    plain = trainer(tmp_path, data, max_steps=2, logging_steps=2)
    _, want = trained(plain)
    for size in (1, 2, 5):
        model = gated()
        out = model(**collate(other))
        job = trainer(
            tmp_path, data, model, max_steps=2, logging_steps=2, evaluated=other, eval_strategy="steps", eval_steps=1,
            per_device_eval_batch_size=size,
        )  # fmt: skip
        first = job.evaluate()
        for name in ("loss", "task_loss", "budget_loss", "kept"):
            assert first[f"eval_{name}"] == pytest.approx(float(out[name].detach()), abs=1e-5), name
        assert first["eval_skipped"] == 0
        _, logs = trained(job)
        for log, expected in zip(logs, want, strict=True):
            assert log.keys() == expected.keys()
            assert all(log[name] == pytest.approx(expected[name], abs=1e-6) for name in log)
        evaluations = [log for log in job.state.log_history if "eval_loss" in log]
        assert len(evaluations) == 2 and not any("kept" in log or "task_loss" in log for log in evaluations)


def test_evaluation_leaves_out_what_teaches_nothing(tmp_path):
    other = samples(4, seed=50)
    want = trainer(tmp_path, samples(4), evaluated=other[1:]).evaluate()
    other[0]["mute"] = True
    job = trainer(tmp_path, samples(4), evaluated=other, per_device_eval_batch_size=1)
    got = job.evaluate()
    assert got["eval_skipped"] == 1
    for name in ("loss", "task_loss", "budget_loss", "kept"):
        assert got[f"eval_{name}"] == pytest.approx(want[f"eval_{name}"], abs=1e-5), name
    with pytest.raises(UnsupportedInputError, match="evaluation"):
        job.evaluate([other[0]])


def test_evaluation_needs_no_labels_to_distill(tmp_path):
    job = trainer(tmp_path, samples(4), gated(objective="distill"), without_labels, evaluated=samples(2, seed=50))
    got = job.evaluate()
    assert (
        got["eval_loss"] == pytest.approx(got["eval_task_loss"] + got["eval_budget_loss"]) and got["eval_task_loss"] > 0
    )


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_model_is_loaded_at_the_end(tmp_path, lora):
    """With nothing but the budget to learn, the first kept the most."""
    model = gated(lora=lora, weight=50.0, tau=0.0)
    job = trainer(
        tmp_path, samples(4), model, max_steps=3, evaluated=samples(2, seed=50), eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="kept",
        greater_is_better=True,
    )  # fmt: skip
    job.train()
    kept = [log["eval_kept"] for log in job.state.log_history if "eval_kept" in log]
    assert kept[0] == max(kept) > kept[-1]
    assert job.state.best_model_checkpoint.endswith("checkpoint-1")
    best, last = (load_file(tmp_path / f"checkpoint-{i}" / "model.safetensors") for i in (1, 3))
    for name, weight in model.pruner.state_dict().items():
        assert torch.equal(weight, best[name]) and not torch.equal(weight, last[name])
    if lora:
        from peft import get_peft_model_state_dict

        folders = [tmp_path / f"checkpoint-{i}" / "lora" / "adapter_model.safetensors" for i in (1, 3)]
        best, last = map(load_file, folders)
        found = get_peft_model_state_dict(model.model)
        assert found.keys() == best.keys() and all(torch.equal(found[name], best[name]) for name in best)
        assert any(not torch.equal(best[name], last[name]) for name in best)


def test_what_would_have_no_effect_is_refused(tmp_path):
    def given(**options):
        arguments = training_arguments(tmp_path, report_to=[], use_cpu=True, **options.pop("arguments", {}))
        return PrunerTrainer(gated(), arguments, **options)

    with pytest.raises(ConfigError, match="compute_metrics"):
        given(compute_metrics=len)
    with pytest.raises(ConfigError, match="compute_loss_func"):
        given(compute_loss_func=len)
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        given(arguments={"label_smoothing_factor": 0.1})
    arguments = training_arguments(tmp_path, report_to=[], use_cpu=True)
    arguments.n_gpu  # noqa: B018  (found now, set below)
    arguments._n_gpu = 2
    with pytest.raises(ConfigError, match="2 GPUs in one process"):
        PrunerTrainer(gated(), arguments)


# ------------------------------------------------------------------ several devices


def work(folder, lora=False, world=1, change=lambda job: None, resume=False):
    """Three steps of four samples, in parts on each of `world` devices; then the best of the three is loaded."""
    job = trainer(
        folder, samples(12), gated(lora), max_steps=3, per_device_train_batch_size=2 // world,
        gradient_accumulation_steps=2, evaluated=samples(2, seed=50), eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="kept",
        greater_is_better=True,
    )  # fmt: skip
    change(job)
    job.train(resume_from_checkpoint=resume)
    job.save_model(str(folder / "end"))


def check_files(got, want):
    """Two runs saved the same weights, and neither the base model."""
    names = sorted(str(x.relative_to(want)) for x in want.rglob("*.safetensors"))
    assert len(names) in (4, 8) and names == sorted(str(x.relative_to(got)) for x in got.rglob("*.safetensors"))
    for name in names:
        weights, expected = load_file(got / name), load_file(want / name)
        assert weights.keys() == expected.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(weights[key], weight, rtol=1e-4, atol=1e-6)
    assert not list(got.rglob("pytorch_model*")), "the base model was saved"


def shard(job):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for module in [*tiny_layers(job.model), job.model]:
        fully_shard(module, mesh=mesh)


def tiny_layers(model):
    return [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]


@pytest.mark.parametrize("lora", [False, True])
def test_fsdp2_saves_and_loads_whole_weights(tmp_path, lora):
    """In a world of one process."""
    work(tmp_path / "plain", lora)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        work(tmp_path / "sharded", lora, change=shard)
    finally:
        torch.distributed.destroy_process_group()
    check_files(tmp_path / "sharded", tmp_path / "plain")


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True])
def test_two_processes_train_as_one(tmp_path, lora):
    work(tmp_path / "one", lora)
    torch.multiprocessing.spawn(_one_of_two, (tmp_path, lora), nprocs=2)
    check_files(tmp_path / "ddp", tmp_path / "one")
    check_files(tmp_path / "fsdp2", tmp_path / "one")
    check_files(tmp_path / "resumed", tmp_path / "one")


def _one_of_two(rank, folder, lora):
    import torch.distributed as dist

    torch.set_num_threads(1)
    both = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1", MASTER_ADDR="localhost", **both)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    work(folder / "ddp", lora, world=2)
    work(folder / "fsdp2", lora, world=2, change=as_launched)
    work(folder / "resumed", lora, world=2, change=stop_after(2))
    dist.barrier()
    work(folder / "resumed", lora, world=2, resume=True)
    dist.destroy_process_group()


def as_launched(job):
    """The trainer as `accelerate launch` with FSDP2 makes it, which does so on GPUs alone."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    job.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    job.accelerator.state.distributed_type = DistributedType.FSDP
    job.is_fsdp_enabled = True


def stop_after(steps):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= steps

    return lambda job: job.add_callback(Stop())
