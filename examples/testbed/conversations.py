"""Write the testbed's training scenes as conversations in LLaVA's format, to train a pruner on.

Run ``python examples/testbed/conversations.py`` from the repository root, after ``train.py --stages sources scenes``.
It writes ``runs/testbed/conversations/conversations.json`` and one PNG a scene.
"""

from __future__ import annotations

import argparse
import json
import random

from PIL import Image
from questions import for_training
from scenes import RUNS, Style, build


def main() -> None:
    """Render scenes that no evaluation picture shares a background with, and ask about them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=3000)
    parser.add_argument("--questions", type=int, default=3, help="a scene, each a sample of its own")
    args = parser.parse_args()
    plain = build("plain", 9000, 2, Style())
    folder = RUNS / "testbed" / "conversations"
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    samples = []
    for index in range(args.scenes):
        name = f"{index:05d}.png"
        Image.fromarray(plain.pictures[index]).save(folder / name)
        for question in for_training(plain.objects[index], draw, args.questions):
            turns = [
                {"from": "human", "value": f"<image>\n{question.text}"},
                {"from": "gpt", "value": question.answer},
            ]
            samples.append({"id": len(samples), "image": name, "conversations": turns})
    draw.shuffle(samples)
    (folder / "conversations.json").write_text(json.dumps(samples))
    print(f"{len(samples)} samples of {args.scenes} scenes in {folder}")


if __name__ == "__main__":
    main()
