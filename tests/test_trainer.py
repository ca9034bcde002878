"""Training a pruner: conversations, batches, the Trainer on one process and on two, resuming, and the example."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import lp_patch
from lp_patch import ConfigError, LearnablePruner, UnsupportedInputError
from lp_patch.training import (
    ConversationCollator,
    ConversationDataset,
    GatedModel,
    PrunerTrainer,
    new_pruner,
    training_arguments,
)

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "testbed" / "model"
QUESTIONS = [
    ("Where is the apple?", "top left"),
    ("How many cats are there?", "2"),
    ("Is there a dog in the image?", "no"),
    ("What color is the sign?", "red"),
]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(MODEL)


@pytest.fixture
def data(tmp_path):
    """A file of eight samples with images, and one without."""
    folder = tmp_path / "data"
    folder.mkdir()
    demo = Image.open(ROOT / "examples" / "testbed" / "demo.png").convert("RGB")
    samples = [{"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "yes"}]}]
    for index in range(8):
        name = f"{index}.png"
        demo.rotate(90 * (index % 4)).save(folder / name)
        question, answer = QUESTIONS[index % 4]
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        samples.append({"image": name, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(samples))
    return folder / "data.json"


def load():
    return LlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).requires_grad_(False)


def trainer(folder, data, processor, steps, seed=0, **options):
    torch.manual_seed(seed)
    return PrunerTrainer(
        GatedModel(load(), **options),
        training_arguments(
            folder, max_steps=steps, per_device_train_batch_size=2, logging_steps=1, save_steps=2, report_to=[],
            disable_tqdm=True, use_cpu=True, learning_rate=1e-3,
        ),
        train_dataset=ConversationDataset(data),
        data_collator=ConversationCollator(processor),
    )  # fmt: skip


# ------------------------------------------------------------------ data


def test_samples_without_images_are_skipped_and_shares_are_drawn(data):
    whole = ConversationDataset(data)
    assert len(whole) == 8 and whole.skipped == 1
    half = ConversationDataset(data, share=0.5, seed=3)
    assert len(half) == 4 and half.samples == ConversationDataset(data, share=0.5, seed=3).samples
    assert half.samples != ConversationDataset(data, share=0.5, seed=4).samples
    sample = whole[0]
    assert [m["role"] for m in sample["messages"]] == ["user", "assistant"]
    assert sample["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": QUESTIONS[0][0]}]
    assert sample["images"][0].size == (336, 336)


def test_labels_are_the_answers_alone(data, processor):
    dataset, collate = ConversationDataset(data), ConversationCollator(processor)
    batch = collate([dataset[i] for i in range(4)])
    for row, (question, answer) in enumerate(QUESTIONS):
        labels = batch["labels"][row]
        said = processor.tokenizer.decode(labels[labels >= 0])
        assert said.replace(" ", "") == answer.replace(" ", "") + processor.tokenizer.eos_token
        where = (labels >= 0).nonzero().flatten()
        assert torch.equal(batch["input_ids"][row, where], labels[where])
        assert batch["attention_mask"][row, where].all()
        asked = processor.tokenizer.decode(batch["input_ids"][row, : where[0]]).replace("<image>", "")
        plain = processor.tokenizer.decode(processor.tokenizer(question, add_special_tokens=False)["input_ids"])
        assert plain in asked and asked.endswith("assistant :")
    assert batch["pixel_values"].shape == (4, 3, 336, 336) and batch["labels"].shape == batch["input_ids"].shape


def test_every_answer_of_a_long_conversation_is_learned(processor):
    turns = [turn for question, answer in QUESTIONS for turn in (question, answer)]
    messages = [
        {
            "role": ("user", "assistant")[i % 2],
            "content": [{"type": "image"}] * (i == 0) + [{"type": "text", "text": x}],
        }
        for i, x in enumerate(turns)
    ]
    picture = Image.new("RGB", (336, 336))
    batch = ConversationCollator(processor)([{"messages": messages, "images": [picture]}])
    labels = batch["labels"][0]
    said = processor.tokenizer.decode(labels[labels >= 0]).replace(" ", "")
    assert said == "".join(f"{answer}</s>" for _, answer in QUESTIONS).replace(" ", "")


def test_a_prompt_without_an_answer_has_no_labels(processor):
    sample = {
        "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the cat?"}]}],
        "images": [Image.new("RGB", (336, 336))],
    }
    batch = ConversationCollator(processor)([sample])
    assert "labels" not in batch
    assert processor.tokenizer.decode(batch["input_ids"][0]).endswith("assistant :")
    cut = ConversationCollator(processor, max_length=580)([sample])
    assert cut["input_ids"].shape == (1, 580) == cut["attention_mask"].shape


def test_pixels_have_the_dtype_asked_for(data, processor):
    batch = ConversationCollator(processor, dtype=torch.bfloat16)([ConversationDataset(data)[0]])
    assert batch["pixel_values"].dtype == torch.bfloat16 and batch["input_ids"].dtype == torch.int64


def test_wrong_data_is_refused(data, tmp_path, processor):
    def written(content):
        path = tmp_path / "x.json"
        path.write_text(json.dumps(content))
        return path

    turn = {"from": "human", "value": "<image>\nHello"}
    with pytest.raises(ValueError, match="list of samples"):
        ConversationDataset(written({"a": 1}))
    with pytest.raises(ValueError, match="none of the 1 samples"):
        ConversationDataset(written([{"conversations": [turn]}]))
    with pytest.raises(ValueError, match="share"):
        ConversationDataset(data, share=0.0)
    with pytest.raises(UnsupportedInputError, match="1 <image> marks for 2"):
        ConversationDataset(written([{"image": ["a", "b"], "conversations": [turn]}]))[0]
    with pytest.raises(UnsupportedInputError, match="'robot'"):
        ConversationDataset(written([{"image": "a", "conversations": [{"from": "robot", "value": ""}]}]))[0]
    late = [{"role": role, "content": [{"type": kind, "text": "cat"}]} for role, kind in (
        ("user", "text"), ("assistant", "text"), ("user", "image"), ("assistant", "text"))]  # fmt: skip
    with pytest.raises(UnsupportedInputError, match="after the first answer"):
        ConversationCollator(processor)([{"messages": late, "images": []}])
    bare = AutoProcessor.from_pretrained(MODEL)
    bare.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        ConversationCollator(bare)


# ------------------------------------------------------------------ training


def test_training_saves_the_pruner_alone_and_logs_both_losses(tmp_path, data, processor):
    job = trainer(tmp_path / "out", data, processor, steps=2)
    before = {name: x.clone() for name, x in job.model.pruner.state_dict().items()}
    job.train()
    logs = [x for x in job.state.log_history if "loss" in x]
    assert len(logs) == 2
    for log in logs:
        assert log["loss"] == pytest.approx(log["task_loss"] + log["budget_loss"], abs=1e-4)
        assert log["budget_loss"] == pytest.approx(log["kept"] ** 2, abs=1e-5)
    saved = tmp_path / "out" / "checkpoint-2"
    assert not any(x.stat().st_size > 3e6 for x in saved.rglob("*")), "the base model was saved"
    weights = load_file(saved / "model.safetensors")
    assert weights.keys() == before.keys() and any(not torch.equal(weights[k], before[k]) for k in before)
    model = load()
    with lp_patch.applied(model, tokens=64, pruner=saved) as patch:
        batch = ConversationCollator(processor)([ConversationDataset(data)[0]])
        model(**batch)
        assert patch.trace.stage1_scores[0] is not None


def test_resumed_training_ends_where_unbroken_training_ends(tmp_path, data, processor):
    whole = trainer(tmp_path / "whole", data, processor, steps=4)
    whole.train()
    first = trainer(tmp_path / "parts", data, processor, steps=4)
    first.args.save_steps = 2
    first.add_callback(stop_after(2))
    first.train()
    assert first.state.global_step == 2
    second = trainer(tmp_path / "parts", data, processor, steps=4, seed=9)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    for name, x in whole.model.pruner.state_dict().items():
        torch.testing.assert_close(second.model.pruner.state_dict()[name], x, rtol=1e-4, atol=1e-6)


def stop_after(steps):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step >= steps
            return control

    return Stop()


def test_accumulated_losses_are_averaged(tmp_path, data, processor):
    job = trainer(tmp_path / "out", data, processor, steps=1)
    assert job.model_accepts_loss_kwargs is False, "Trainer would sum the parts' losses instead of averaging them"


def test_what_trainer_refuses(tmp_path, data, processor):
    with pytest.raises(ConfigError, match="GatedModel"):
        PrunerTrainer(load(), training_arguments(tmp_path, report_to=[], use_cpu=True))
    frozen = GatedModel(load(), new_pruner(192).requires_grad_(False))
    with pytest.raises(ConfigError, match="nothing"):
        PrunerTrainer(frozen, training_arguments(tmp_path, report_to=[], use_cpu=True))


def example(*options, processes=1):
    """Run examples/train_pruner.py as a user does."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"] * (processes > 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, str(ROOT / "examples" / "train_pruner.py"), str(MODEL), *map(str, options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_example_under_torchrun_with_two_processes(tmp_path, data):
    out = tmp_path / "pruner"
    options = [data, "--output", out, "--share", 1, "--batch", 2, "--dtype", "float32", "--workers", 0]
    printed = example(*options, "--steps", 2, "--save-steps", 1, processes=2)
    assert "8 samples (1 without an image skipped)" in printed
    state = json.loads((out / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(1.0), "two processes of two samples take eight in two steps"
    LearnablePruner.from_pretrained(out)
    # the same command goes on
    example(*options, "--steps", 3, "--save-steps", 1, "--objective", "distill", processes=1)
    assert (out / "checkpoints" / "checkpoint-3").is_dir()


def test_the_example_heals_with_lora(tmp_path, data):
    out = tmp_path / "healed"
    example(
        data, "--output", out, "--share", 0.5, "--steps", 1, "--batch", 2, "--dtype", "float32", "--workers", 0,
        "--lora-rank", 2, "--checkpointing",
    )  # fmt: skip
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(), out / "lora")
    with lp_patch.applied(model, tokens=64, pruner=out) as patch:
        batch = ConversationCollator(AutoProcessor.from_pretrained(MODEL))([ConversationDataset(data)[0]])
        model(**batch)
        assert len(patch.trace.stage1[0]) < 576
