"""Questions about a scene, with the answer and the objects that the answer depends on."""

from __future__ import annotations

import random
from dataclasses import dataclass

from scenes import SIDE
from vocabulary import COLOURS, CORNERS, NAMES, NUMBERS, SIGN, plural

TYPES = ("existence", "count", "what", "where", "colour")
MARGIN = 14
"""An object must be this many pixels off the middle lines to lie in a corner."""


@dataclass(frozen=True)
class Question:
    """A question; ``relevant`` numbers the scene's objects, ``pointer`` is the word that points at them."""

    type: str
    text: str
    answer: str
    relevant: tuple[int, ...]
    pointer: str


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def existence(name: str, where: list[int]) -> Question:
    """Is it there?"""
    text = f"Is there {_article(name)} {name} in the image?"
    return Question("existence", text, "yes" if where else "no", tuple(where), name)


def _offsets(thing: dict) -> tuple[float, float]:
    """Offset of an object's centre from the middle of the picture."""
    box = thing["box"]
    return (box[0] + box[2]) / 2 - SIDE / 2, (box[1] + box[3]) / 2 - SIDE / 2


def pool(objects: list[dict]) -> dict[str, list[Question]]:
    """Every question that has one right answer, by type; existence ones with answer "yes" only."""
    places: dict[str, list[int]] = {}
    for index, thing in enumerate(objects):
        places.setdefault(thing["kind"], []).append(index)
    found: dict[str, list[Question]] = {kind: [] for kind in TYPES}
    for name, where in places.items():
        found["existence"].append(existence(name, where))
        if name != SIGN and len(where) <= len(NUMBERS):
            text = f"How many {plural(name)} are there?"
            found["count"].append(Question("count", text, str(len(where)), tuple(where), name))
        if len(where) == 1:
            across, down = _offsets(objects[where[0]])
            if min(abs(across), abs(down)) > MARGIN:
                corner = CORNERS[across > 0, down > 0]
                found["where"].append(Question("where", f"Where is the {name}?", corner, tuple(where), name))
    for (right, bottom), corner in CORNERS.items():
        inside = []
        unclear = False
        for index, thing in enumerate(objects):
            across, down = _offsets(thing)
            depth = min(across if right else -across, down if bottom else -down)
            if depth > MARGIN:
                inside.append(index)
            elif depth > -MARGIN:
                unclear = True
        kinds = {objects[index]["kind"] for index in inside}
        if len(kinds) == 1 and not unclear:
            text = f"What is in the {corner} of the image?"
            pointer = corner.split()[1]
            found["what"].append(Question("what", text, kinds.pop(), tuple(inside), pointer))
    for index, thing in enumerate(objects):
        if "colour" in thing:
            found["colour"].append(Question("colour", "What color is the sign?", thing["colour"], (index,), SIGN))
    return found


def absent(objects: list[dict], draw: random.Random) -> Question:
    """An existence question whose answer is no."""
    present = {thing["kind"] for thing in objects}
    return existence(draw.choice([name for name in NAMES if name not in present]), [])


def caption(objects: list[dict]) -> Question:
    """A long answer: all objects and their corners, where they lie in one, from the top left to the bottom right."""

    def corner(thing: dict) -> tuple[bool, bool]:
        across, down = _offsets(thing)
        return down > 0, across > 0

    said = []
    for thing in sorted(objects, key=lambda x: (*corner(x), *x["box"])):
        clear = min(map(abs, _offsets(thing))) > MARGIN
        words = (thing.get("colour"), thing["kind"], CORNERS[corner(thing)[::-1]] if clear else None)
        said.append(" ".join(x for x in words if x))
    return Question("caption", "Describe the image.", ", ".join(said), tuple(range(len(objects))), "image")


def for_training(objects: list[dict], draw: random.Random, count: int = 12) -> list[Question]:
    """A mix of questions; count questions cover 1, 2 and 3 where the scene has them."""
    found = pool(objects)
    chosen = draw.sample(found["existence"], min(2, len(found["existence"])))
    chosen += [absent(objects, draw) for _ in range(2)]
    for number in NUMBERS:
        fitting = [question for question in found["count"] if question.answer == number]
        if fitting:
            chosen.append(draw.choice(fitting))
    chosen += found["what"] + found["where"] + found["colour"]
    draw.shuffle(chosen)
    return chosen[:count]


def balanced(scenes: list[list[dict]], draw: random.Random, per_scene: int = 6) -> list[list[Question]]:
    """Questions for an evaluation: existence half yes, the other answers as even as they come."""
    used: dict[tuple[str, str], int] = {}
    result = []
    for objects in scenes:
        found = pool(objects)
        chosen = [draw.choice(found["existence"]), absent(objects, draw)]
        fourth = "count" if draw.random() < 0.2 else "colour"
        quota = ["count", "where", "what", fourth]
        for kind in [*quota, "where", "count", "what"]:
            options = [question for question in found[kind] if question not in chosen]
            if options and len(chosen) < per_scene:
                draw.shuffle(options)
                best = min(options, key=lambda question: used.get((question.type, question.answer), 0))
                used[best.type, best.answer] = used.get((best.type, best.answer), 0) + 1
                chosen.append(best)
        result.append(chosen)
    return result


ANSWERS = ["yes", "no", *NUMBERS, *CORNERS.values(), *COLOURS, *NAMES, SIGN]
