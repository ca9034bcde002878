"""Train the weights of "oc-vtp" or "metacompress" for a checkpoint, on conversations in LLaVA's format.

    python examples/train_neighbours.py oc-vtp CHECKPOINT DATA.json --output FOLDER
    python examples/train_neighbours.py metacompress CHECKPOINT DATA.json --output FOLDER

The output folder is what `lp_patch.apply(model, pruner=...)` takes. "oc-vtp" learns from the pictures alone,
"metacompress" learns to answer as the model does with all of its tokens. Each picture is encoded once, and what is
needed of it stays in memory. For LLaVA 1.5 with a CLIP tower; the classes in `lp_patch.training` know no family.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lp_patch.merging import MergingPruner
from lp_patch.pruner import Pruner
from lp_patch.slots import SlotPruner
from lp_patch.training import (
    ConversationCollator,
    ConversationDataset,
    MergingTraining,
    SlotTraining,
    early_tokens,
    fit,
    new_slots,
)

EVERY = 25  # steps between two lines of the log


def options() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[SlotPruner.kind, MergingPruner.kind])
    parser.add_argument("model", help="checkpoint: a Hub id or a folder")
    parser.add_argument("data", type=Path, help="JSON file in LLaVA's conversation format")
    parser.add_argument("--images", type=Path, help="folder that image names start from (default: the JSON's own)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--samples", type=int, default=1000, help="pictures, each with a question of its own")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, nargs=2, default=(16, 128), help="each step draws how many, from and to")
    parser.add_argument("--key-size", type=int, default=128, help="metacompress: width of queries and keys")
    parser.add_argument(
        "--entropy", type=float, default=1.0, help="metacompress: factor of the rows' entropy (paper: 1)"
    )
    parser.add_argument("--column", type=float, default=1.0, help="metacompress: of the largest column (paper: 1)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def drawn(args: argparse.Namespace, chance: random.Random) -> int:
    """How many tokens a step keeps; small numbers as often as large ones."""
    low, high = args.tokens
    return round(low * (high / low) ** chance.random())


def log(args: argparse.Namespace) -> object:
    """What prints the means of the last steps."""
    began, held = time.perf_counter(), []

    def report(step: int, about: dict[str, float]) -> None:
        held.append(about)
        if (step + 1) % EVERY == 0 or step + 1 == args.steps:
            means = ", ".join(f"{name} {sum(x[name] for x in held) / len(held):.4f}" for name in about)
            print(f"[{step + 1}/{args.steps}] {time.perf_counter() - began:.0f} s: {means}", flush=True)
            held.clear()

    return report


def one_each(dataset: ConversationDataset, chance: random.Random) -> list[int]:
    """Numbers of samples in random order, no picture twice."""
    numbers = list(range(len(dataset)))
    chance.shuffle(numbers)
    found = {str(dataset.samples[number]["image"]): number for number in reversed(numbers)}
    return [number for number in numbers if found[str(dataset.samples[number]["image"])] == number]


def train_slots(args: argparse.Namespace, model: torch.nn.Module, batches: object) -> tuple[Pruner, int]:
    """Slots that rebuild an early layer's tokens, and how many pictures they were trained on."""
    kept: list[Tensor] = []
    while sum(map(len, kept)) < args.samples and (inputs := next(batches, None)) is not None:
        kept.append(early_tokens(model, inputs["pixel_values"]))
    tokens = torch.cat(kept)[: args.samples]
    print(f"{len(tokens)} pictures of {tokens.shape[1]} tokens, {tokens.shape[2]} wide", flush=True)
    pruner = new_slots(tokens.shape[2])
    training, chance = SlotTraining(pruner), random.Random(args.seed)

    def losses(step: int) -> tuple[Tensor, dict[str, float]]:
        count = drawn(args, chance)
        loss = training(tokens[chance.sample(range(len(tokens)), args.batch)], torch.randn(count, pruner.slot_size))
        return loss, {"error": loss.item(), "slots": count}

    fit(training, losses, args.steps, args.learning_rate, log(args))
    return pruner, len(tokens)


class RememberedTower:
    """In place of the vision tower: each picture is encoded once, then its number stands for its pixels."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tower, self.layer = model.model.vision_tower, model.config.vision_feature_layer
        self.layers = self.tower.config.num_hidden_layers + 1
        self.encode, self.states = self.tower.forward, []
        self.tower.forward = self.recall

    @torch.no_grad()
    def read(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) -> their numbers (B,)."""
        start = len(self.states)
        self.states += self.encode(pixels, output_hidden_states=True).hidden_states[self.layer]
        return torch.arange(start, len(self.states))

    def recall(self, numbers: Tensor, **asked: object) -> BaseModelOutputWithPooling:
        """The feature layer of these pictures (B,)."""
        states = [None] * self.layers
        states[self.layer] = torch.stack([self.states[number] for number in numbers.tolist()])
        return BaseModelOutputWithPooling(hidden_states=tuple(states))


def train_mixtures(args: argparse.Namespace, model: torch.nn.Module, batches: object) -> tuple[Pruner, int]:
    """Mixtures with which the model answers as with all tokens, and how many pictures they were trained on."""
    vision = model.config.vision_config
    pruner = MergingPruner(vision.hidden_size, args.key_size, vision.image_size // vision.patch_size)
    training = MergingTraining(model, pruner, entropy=args.entropy, column=args.column).train()
    tower, lessons, began = RememberedTower(model), [], time.perf_counter()
    while len(tower.states) < args.samples and (inputs := next(batches, None)) is not None:
        inputs["pixel_values"] = tower.read(inputs["pixel_values"])
        lessons.append({**inputs, "full": training.full_logits(**inputs)})
    print(f"{len(tower.states)} pictures read in {time.perf_counter() - began:.0f} s", flush=True)
    chance = random.Random(args.seed)

    def losses(step: int) -> tuple[Tensor, dict[str, float]]:
        count = drawn(args, chance)
        loss, *parts = training(tokens=count, **chance.choice(lessons))
        names = ("divergence", "entropy", "column")
        return loss, {**{name: x.item() for name, x in zip(names, parts, strict=True)}, "tokens": count}

    fit(pruner, losses, args.steps, args.learning_rate, log(args))
    return pruner.eval(), len(tower.states)


def main() -> None:
    """Train and save."""
    args = options()
    set_seed(args.seed)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).requires_grad_(False).eval()
    dataset = ConversationDataset(args.data, args.images)
    collate = ConversationCollator(AutoProcessor.from_pretrained(args.model))
    chance = random.Random(args.seed)

    def batches():
        numbers = one_each(dataset, chance)
        for start in range(0, len(numbers) - args.batch + 1, args.batch):
            yield collate([dataset[number] for number in numbers[start : start + args.batch]])

    train = train_slots if args.kind == SlotPruner.kind else train_mixtures
    pruner, samples = train(args, model, batches())
    pruner.base_model, pruner.model_type = args.model, model.config.model_type
    own = ("entropy", "column") if args.kind == MergingPruner.kind else ()
    pruner.training_info = {
        "objective": "rebuild tokens" if args.kind == SlotPruner.kind else "answer as the full model",
        "data": args.data.name,
        "samples": samples,
        **{name: getattr(args, name) for name in ("seed", "steps", "batch", *own)},
        "tokens": list(args.tokens),
        "learning_rate": args.learning_rate,
    }
    pruner.save_pretrained(args.output)


if __name__ == "__main__":
    main()
