"""Which decoder layer's text attention finds what the question asks about: a diagnosis for the testbed's models.

    python examples/testbed/layers.py runs/smollm/smollm-testbed --output examples/results/layers_smollm.csv

For every layer of the unpatched model: of the patches asked about (of 20 or 40 where there are more), the share that is
among the 20 and 40 of all 576 with most attention from the text after the picture (what stage 2 reads), and from the
last token alone; and what share of the text's attention goes to the picture. Questions are every n-th of those in the
evaluation set that ask about patches.
"""

from __future__ import annotations

import argparse
import csv
import json
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lp_patch.attention import install_tap
from lp_patch.score import received_attention

EVALUATION = Path(__file__).resolve().parent / "evaluation"
TOPS = (20, 40)


@torch.inference_mode()
def main() -> None:
    """Run the questions, write one row a layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    asked = [x for x in json.loads((EVALUATION / "questions.json").read_text())["questions"] if x["relevant"]]
    asked = [x for x in asked if x["split"] == "seen_styles"]
    asked = asked[:: max(1, len(asked) // args.questions)][: args.questions]
    layers = model.model.language_model.layers
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def observe(number: int, _: None, query: torch.Tensor, key: torch.Tensor, *rest: torch.Tensor | float) -> None:
        """Attention (S,) received from the text after the picture, and from the last token."""
        _value, scaling = rest
        text = torch.zeros(1, query.shape[2])
        text[:, after:] = 1 / (query.shape[2] - after)
        last = torch.zeros_like(text)
        last[:, -1] = 1
        found[number] = tuple(received_attention(query, key, x, scaling)[0] for x in (text, last))

    for number, layer in enumerate(layers):
        install_tap(layer.self_attn, partial(observe, number))
    names = [f"{of}_{top}" for of in ("text", "last") for top in TOPS] + ["mass"]
    sums = torch.zeros(len(layers), len(names))
    for question in asked:
        text = f"USER: <image>\n{question['question']} ASSISTANT:"
        with Image.open(EVALUATION / "pictures" / question["picture"]) as picture:
            inputs = processor(images=picture.convert("RGB"), text=[text], return_tensors="pt")
        visual = inputs["input_ids"].flatten() == model.config.image_token_id
        after = int(visual.nonzero().max()) + 1
        model(**inputs)
        wanted = set(question["relevant"])
        for number in range(len(layers)):
            scores = [x[visual] for x in found[number]]
            tops = [(x, top) for x in scores for top in TOPS]
            hits = [len(wanted & set(x.topk(top).indices.tolist())) / min(top, len(wanted)) for x, top in tops]
            sums[number] += torch.tensor([*hits, float(scores[0].sum())])
    with args.output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["layer", *names, "questions"])
        for number, row in enumerate((sums / len(asked)).tolist(), 1):
            writer.writerow([number, *(f"{x:.3f}" for x in row), len(asked)])
    print(args.output.read_text())


if __name__ == "__main__":
    main()
