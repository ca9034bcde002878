"""The shipped testbed: every supported transformers reads the same model and the same prompts from its folder."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import V5
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

TESTBED = Path(__file__).resolve().parent.parent / "examples" / "testbed"
DEMO = json.loads((TESTBED / "demo.json").read_text())
QUESTION = "Where is the apple?"
START = 1
made_by_5 = pytest.mark.skipif(not V5, reason="its scripts need transformers 5")


@pytest.fixture(scope="module")
def processor():
    # transformers 4 speaks of another default to come where nothing is said
    return AutoProcessor.from_pretrained(TESTBED / "model", **({} if V5 else {"use_fast": False}))


def conversation(question, image=None):
    picture = {"type": "image"} if image is None else {"type": "image", "image": image}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


def test_the_folder_loads_as_the_model_that_was_trained(processor):
    model, loading = LlavaForConditionalGeneration.from_pretrained(
        TESTBED / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    # the second frequency of a head of 64: base ** (-2 / 64)
    assert model.model.language_model.rotary_emb.inv_freq[1].item() == pytest.approx(500_000 ** (-2 / 64))
    picture = Image.open(TESTBED / DEMO["picture"]).convert("RGB")
    texts = [
        processor.apply_chat_template(conversation(x["question"]), add_generation_prompt=True)
        for x in DEMO["questions"]
    ]
    inputs = processor(images=[picture] * len(texts), text=texts, padding=True, return_tensors="pt")
    output = model.eval().generate(**inputs)
    said = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [x.strip() for x in said] == [x["answer"] for x in DEMO["questions"]]


def test_every_way_to_a_prompt_has_one_start_token(processor):
    """By hand or rendered, and tokenised with special tokens or, as servers do, without."""
    image = Image.new("RGB", (336, 336))
    rendered = processor.apply_chat_template(conversation(QUESTION), add_generation_prompt=True)
    by_hand = f"USER: <image>\n{QUESTION} ASSISTANT:"
    assert rendered == f"<s>{by_hand}"
    at_once = processor.apply_chat_template(
        conversation(QUESTION, image), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ways = [at_once["input_ids"][0].tolist()]
    for text in (rendered, by_hand):
        for special in (True, False):
            inputs = processor(images=image, text=text, add_special_tokens=special, return_tensors="pt")
            ways.append(inputs["input_ids"][0].tolist())
    assert all(ids == ways[0] for ids in ways)
    assert ways[0][0] == START and ways[0].count(START) == 1 and ways[0].count(4) == 576


def test_later_turns_and_single_words_get_no_start_token(processor):
    words = processor.tokenizer
    turns = [*conversation(QUESTION), {"role": "assistant", "content": "top left"}, *conversation("Is it red?")[:1]]
    turns[-1]["content"] = turns[-1]["content"][1:]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    ids = words(text).input_ids
    assert ids.count(START) == 1 and ids.count(words.eos_token_id) == 1
    assert START not in words("top left").input_ids


@made_by_5
def test_the_folder_is_what_its_scripts_write(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TESTBED))
    import export

    shipped = load_file(TESTBED / "model" / "model.safetensors")
    model = LlavaForConditionalGeneration.from_pretrained(TESTBED / "model")
    export.export(model.state_dict(), tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == shipped.keys()
    assert all(torch.equal(written[name], shipped[name]) for name in shipped)
    for name in ("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (TESTBED / "model" / name).read_text(), name
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (tmp_path, TESTBED / "model"))
        differing = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
        assert differing <= {"transformers_version"}, name
    assert AutoTokenizer.from_pretrained(tmp_path).image_token == "<image>"
