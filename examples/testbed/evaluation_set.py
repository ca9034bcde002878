"""Render the fixed evaluation set: held-out photographs, the seen drawing styles and one unseen style."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import questions
from PIL import Image
from scenes import IGNORE, UNSEEN_STYLE, Style, bank_for, labels, render

FOLDER = Path(__file__).resolve().parent / "evaluation"
SPLITS = {
    "seen_styles": (176, 77, Style(held_out=True)),
    "unseen_style": (80, 78, Style(held_out=True, styles=(UNSEEN_STYLE,))),
}
QUALITY = 80
DEMO = ("seen_styles", 12, slice(1, 5))
"""Split, scene and questions of the demo picture."""


def build() -> None:
    """Write the pictures and ``questions.json``."""
    bank = bank_for(True)
    pictures = FOLDER / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    foreground: dict[str, list[int]] = {}
    asked = []
    for split, (count, seed, style) in SPLITS.items():
        scenes = [render(bank, style, seed * 1_000_003 + index) for index in range(count)]
        rows = questions.balanced([scene.objects for scene in scenes], random.Random(seed))
        for index, (scene, row) in enumerate(zip(scenes, rows, strict=True)):
            name = f"{split}-{index:03d}.webp"
            pixels = scene.pixels.clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(pictures / name, quality=QUALITY, method=6)
            planes = labels(scene)
            if (split, index) == DEMO[:2]:
                Image.fromarray(pixels).save(FOLDER.parent / "demo.png", optimize=True)
                known = [{"question": asking.text, "answer": asking.answer} for asking in row]
                demo = json.dumps({"picture": "demo.png", "questions": known[DEMO[2]]}, indent=2)
                (FOLDER.parent / "demo.json").write_text(demo + "\n")
            solid = (planes[0] > 0) & (planes[0] < IGNORE)
            foreground[name] = np.flatnonzero(solid).tolist()
            for number, question in enumerate(row):
                wanted = np.isin(planes[1], [thing + 1 for thing in question.relevant]) & solid
                asked.append(
                    {
                        "id": f"{split}-{index:03d}-{number}",
                        "picture": name,
                        "split": split,
                        "type": question.type,
                        "question": question.text,
                        "answer": question.answer,
                        "relevant": np.flatnonzero(wanted).tolist(),
                    }
                )
    content = {"foreground": foreground, "questions": asked}
    text = json.dumps(content, separators=(",", ":")).replace('{"id"', '\n{"id"')
    text = text.replace('"questions"', '\n"questions"')
    (FOLDER / "questions.json").write_text(text + "\n")
    print(f"{len(asked)} questions on {len(foreground)} pictures")


if __name__ == "__main__":
    build()
