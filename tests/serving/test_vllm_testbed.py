"""The testbed's questions: each answer, and its log-probabilities, as transformers gives them with `apply`."""

import json
import os

import pytest
from asking import TESTBED, compare, expect, serve
from PIL import Image
from transformers import AutoTokenizer

MODEL = TESTBED / "model"
QUESTIONS = int(os.environ.get("QUESTIONS", "40"))  # 200 in `make compare-vllm`
SETTINGS = [
    {"tokens": 16, "scorer": "covering"},
    {"tokens": 64, "scorer": "learned"},
    {"tokens": 64, "scorer": "covering"},
    {"tokens": 16, "scorer": "learned"},
    {"tokens": 64, "scorer": "diversity"},
    {"tokens": 16, "scorer": "diversity"},
    {"tokens": 64, "scorer": "cls"},
    {"tokens": 16, "scorer": "cls"},
]
TRIED = SETTINGS if QUESTIONS > 40 else SETTINGS[:1]


def questions(count):
    """[(text, pictures)] and the answers that are right."""
    asked = json.loads((TESTBED / "evaluation" / "questions.json").read_text())["questions"][:count]
    pictures = {x["picture"]: Image.open(TESTBED / "evaluation" / "pictures" / x["picture"]) for x in asked}
    prompts = [(f"USER: <image>\n{x['question']} ASSISTANT:", [pictures[x["picture"]].convert("RGB")]) for x in asked]
    return prompts, [x["answer"] for x in asked]


@pytest.mark.parametrize("options", TRIED, ids=lambda x: "-".join(map(str, x.values())))
def test_equal(options):
    """Questions share pictures, so that prompts are found in the cache up to within one."""
    prompts, right = questions(QUESTIONS)
    (ours,) = serve(MODEL, options, [prompts], 3, max_model_len=700)
    words = AutoTokenizer.from_pretrained(MODEL)
    texts = [words.decode(ids, skip_special_tokens=True).strip() for ids, *_ in ours]
    unequal, difference = compare(ours, expect(MODEL, options, prompts, 3))
    correct = sum(a == b for a, b in zip(texts, right, strict=True))
    print(f"\n{options}: of {len(prompts)} {correct} right, {unequal} unequal, log-probabilities to {difference:.1e}")
    assert unequal == 0 and difference < 1e-4
