"""Training a pruner: conversations, batches, the Trainer on one process and on two, resuming, and the example."""

import json
import os
import re
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
    with pytest.warns(UserWarning, match="a sample: a prompt of 586 tokens, longer than max_length=580"):
        cut = ConversationCollator(processor, max_length=580)([sample])
    assert list(cut) == ["skipped"], "what a prompt asks stands at its end"


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
    bare = AutoProcessor.from_pretrained(MODEL)
    bare.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        ConversationCollator(bare)


# ------------------------------------------------------------------ what nothing can be learned from


def conversation(*texts, images=1, name=None):
    """A sample as a dataset gives it: turns of a user and an assistant, pictures before the first."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "image"}] * (images * (i == 0)) + said(text)}
        for i, text in enumerate(texts)
    ]
    pictures = [Image.new("RGB", (336, 336), (40 * i, 0, 0)) for i in range(images)]
    return {"messages": messages, "images": pictures, **({"name": name} if name else {})}


def said(text):
    return [{"type": "text", "text": text}] if text else []


SOUND = [conversation(question, answer) for question, answer in QUESTIONS[:2]]
LONG = 600  # tokens, where the SOUND take less


def endless(processor):
    """The processor with a template that puts no mark at the end of an answer."""
    assert "eos_token" in processor.chat_template or "</s>" in processor.chat_template
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }} : {% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    return processor


def odd_template(processor):
    """The processor with a template that takes turns strictly."""
    check = "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}"
    processor.chat_template = check + "{% endif %}{% endfor %}" + processor.chat_template
    return processor


class Rewriting:
    """A processor that changes some texts before it reads them."""

    def __init__(self, processor):
        self.chat_template, self.tokenizer = processor.chat_template, processor.tokenizer
        self.apply_chat_template, self._call = processor.apply_chat_template, processor

    def __call__(self, text, **options):
        return self._call(text=[x.replace("dog", "dog cat") for x in text], **options)


FAULTY = {
    "empty answer, no end mark": (conversation("Where is the cat?", "", name="X"), endless, "no token of an answer"),
    "an answer that is cut off": (conversation("cat " * 60, "red", name="X"), None, r"before max_length=600 \(of 6.."),
    "a cut through the pictures": (conversation("cat", "red", images=2, name="X"), None, "before max_length=600"),
    "a picture that is missing": ({"name": "X", "fault": "'a.png' cannot be opened"}, None, "'a.png' cannot be opened"),
    "no turns": ({"name": "X", "messages": [], "images": []}, None, "no turns"),
    "a late picture": (
        {**conversation("cat", "red"), "messages": [*conversation("cat", "red")["messages"], *SOUND[0]["messages"]],
         "images": [*SOUND[0]["images"] * 2], "name": "X"}, None, "in or after the first answer"),
    "a picture in an answer": (
        {"messages": [{"role": "user", "content": said("cat")}, {"role": "assistant", "content": [{"type": "image"}]}],
         "images": SOUND[0]["images"], "name": "X"}, None, "in or after the first answer"),
    "an answer without a question": (
        {**conversation("cat", "red"), "messages": conversation("cat", "red")["messages"][1:], "name": "X"},
        None, "the chat template fails, IndexError"),
    "a mark in a text": (conversation("<image> cat", "red", name="X"), None, "the processor fails, "),
    "a text that is read otherwise": (conversation("cat", "a dog", name="X"), Rewriting, "make other tokens"),
    "two turns of one side": (
        {**conversation("cat", "red", "dog", "2"), "messages": [
            m for i, m in enumerate(conversation("cat", "red", "dog", "2")["messages"]) if i != 1], "name": "X"},
        odd_template, "the chat template fails, TemplateError"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTY)
def test_a_sample_that_teaches_nothing_is_left_out_of_its_batch_and_named(case):
    sample, changed, reason = FAULTY[case]
    processor = AutoProcessor.from_pretrained(MODEL)
    collate = ConversationCollator(changed(processor) if changed else processor, max_length=LONG)
    with pytest.warns(UserWarning, match=f"X: .*{reason}"):
        mixed = collate([SOUND[0], sample, SOUND[1]])
    (named,) = mixed.pop("skipped")
    assert named.startswith("X: ") and re.search(reason, named)
    want = collate(SOUND)
    assert mixed.keys() == want.keys()
    assert all(torch.equal(mixed[key], want[key]) for key in want)
    with pytest.warns(UserWarning):
        alone = collate([sample])
    assert alone == {"skipped": [named]}


def test_an_answer_that_is_cut_in_the_middle_is_learned_up_to_there(processor):
    sample = conversation("Where is the cat?", "cat " * 60)
    whole = ConversationCollator(processor)([sample])
    cut = ConversationCollator(processor, max_length=LONG)([sample, SOUND[0]])
    assert cut["input_ids"].shape[1] == LONG
    assert torch.equal(cut["labels"][0], whole["labels"][0, :LONG]) and (cut["labels"][0] >= 0).sum() > 5


def test_an_empty_answer_beside_another_is_no_fault():
    sample = conversation("Where is the cat?", "", "Where is the dog?", "top left")
    labels = ConversationCollator(endless(AutoProcessor.from_pretrained(MODEL)))([sample])["labels"]
    decode = AutoProcessor.from_pretrained(MODEL).tokenizer.decode
    assert decode(labels[labels >= 0]).replace(" ", "") == "topleft"


def test_batches_that_cannot_be_made_of_sound_samples_are_an_error(processor):
    with pytest.raises(UnsupportedInputError, match="with and without answers"):
        ConversationCollator(processor)([SOUND[0], conversation("Where is the cat?")])


def test_a_file_tells_which_samples_teach_nothing(data):
    def turns(*values):
        return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]

    sound = json.loads(data.read_text())
    faulty = [
        {"image": "0.png", "conversations": []},
        {"image": "0.png", "conversations": None},
        {"image": "0.png", "conversations": ["Hello"]},
        {"image": "0.png", "conversations": [{"from": "robot", "value": "<image>"}]},
        {"image": "0.png", "conversations": turns("<image>", None)},
        {"image": "0.png", "conversations": turns("<image> who?", "a <image>")},
        {"image": "0.png", "conversations": turns("no mark", "yes")},
        {"image": [7], "conversations": turns("<image> what?", "yes")},
        {"image": "0.png", "conversations": turns("<image> what?", " ")},
        {"id": "last", "image": "0.png", "conversations": turns("<image> what?")},
    ]
    data.write_text(json.dumps([*sound, *faulty]))
    with pytest.warns(UserWarning, match=r"10 of the 18 .* left out: sample 9: it has no turns; .*; and 7 more"):
        dataset = ConversationDataset(data)
    assert len(dataset) == 8 and dataset.skipped == 1 and len(dataset.faulty) == 10
    assert [fault.split(":")[0] for fault in dataset.faulty][-2:] == ["sample 17", "sample 18 (id 'last')"]
    assert dataset.faulty[-1].endswith("it has no answer") and dataset.faulty[-2].endswith("it has no answer")
    data.write_text(json.dumps(faulty))
    with pytest.raises(UnsupportedInputError, match="none of the 10 samples"):
        ConversationDataset(data)


def test_a_file_without_any_answer_is_of_prompts(data, processor):
    prompts = [{**x, "conversations": x["conversations"][:1]} for x in json.loads(data.read_text())]
    data.write_text(json.dumps(prompts))
    dataset = ConversationDataset(data)
    assert len(dataset) == 8 and not dataset.faulty
    assert "labels" not in ConversationCollator(processor)([dataset[0], dataset[1]])


def test_pictures_that_cannot_be_opened_are_said_by_the_sample(data):
    (data.parent / "0.png").unlink()
    (data.parent / "1.png").write_bytes(b"no picture")
    whole = (data.parent / "2.png").read_bytes()
    (data.parent / "2.png").write_bytes(whole[: len(whole) // 2])
    dataset = ConversationDataset(data)
    for index in range(3):
        sample = dataset[index]
        assert sample.keys() == {"name", "fault"} and sample["name"] == f"sample {index + 1}"
        assert f"'{index}.png' cannot be opened" in sample["fault"]
    assert "fault" not in dataset[3]


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


@pytest.mark.long  # half a minute
def test_the_example_under_torchrun_with_two_processes(tmp_path, data):
    out = tmp_path / "pruner"
    (data.parent / "3.png").unlink()
    options = [data, "--output", out, "--share", 1, "--batch", 2, "--dtype", "float32", "--workers", 0]
    printed = example(*options, "--steps", 2, "--save-steps", 1, processes=2)
    assert "8 samples (1 without an image skipped)" in printed
    state = json.loads((out / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(1.0), "two processes of two samples take eight in two steps"
    assert "left out of training, sample 4: '3.png' cannot be opened" in printed
    assert "1 samples were left out of training" in printed
    info = LearnablePruner.from_pretrained(out).training_info
    assert (info["samples"], info["skipped"]) == (7, 1)
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
