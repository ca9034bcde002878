"""What lmms-eval asks of the testbed's tasks; as a script, writes their documents below ``runs/lmms_eval``."""

import ast
import json
from pathlib import Path

from PIL import Image

TESTBED = Path(__file__).resolve().parent.parent / "testbed"
CHOICES = ("yes", "no")


def doc_to_visual(doc: dict) -> list[Image.Image]:
    """The picture."""
    return [Image.open(TESTBED / "evaluation" / "pictures" / doc["picture"]).convert("RGB")]


def doc_to_text(doc: dict) -> str:
    """The question."""
    return doc["question"]


def doc_to_choice(doc: dict) -> list[str]:
    """What is weighed."""
    return list(CHOICES)


def doc_to_number(doc: dict) -> int:
    """Which choice is right."""
    return CHOICES.index(doc["answer"])


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Exact match, as evaluate.py counts."""
    return {"exact": float(results[0].strip() == doc["answer"])}


def weigh(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether the likelier choice is right; lmms-eval 0.7.3 brings each choice's (loss, said) as a string."""
    losses = [ast.literal_eval(x)[0] for x in results]
    return {"acc": float(CHOICES[losses.index(min(losses))] == doc["answer"])}


def main() -> None:
    """Write the documents: the questions in the styles of training, in the file's order."""
    folder = Path("runs") / "lmms_eval"
    folder.mkdir(parents=True, exist_ok=True)
    everything = json.loads((TESTBED / "evaluation" / "questions.json").read_text())["questions"]
    asked = [{name: x[name] for name in ("id", "picture", "question", "answer")} for x in everything]
    asked = [x for x in asked if x["picture"].startswith("seen_styles")]
    (folder / "testbed.json").write_text(json.dumps(asked))
    binary = [x for x in asked if x["answer"] in CHOICES]
    (folder / "testbed_likelihood.json").write_text(json.dumps(binary))
    print(f"{len(asked)} questions, {len(binary)} of yes or no, in {folder}")


if __name__ == "__main__":
    main()
