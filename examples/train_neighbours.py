"""Train the weights of "oc-vtp" or "metacompress" for a checkpoint, on conversations in LLaVA's format.

    python examples/train_neighbours.py oc-vtp CHECKPOINT DATA.json --output FOLDER
    python examples/train_neighbours.py metacompress CHECKPOINT DATA.json --output FOLDER

The output folder is what `lp_patch.apply(model, pruner=...)` takes. "oc-vtp" learns from the pictures alone, and keeps
what it reads of them in memory; "metacompress" learns to answer as the model does with all of its tokens.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

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
    parser.add_argument("--samples", type=int, default=1000, help="pictures that oc-vtp reads")
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


def train_mixtures(args: argparse.Namespace, model: torch.nn.Module, batches: object) -> tuple[Pruner, int]:
    """Mixtures with which the model answers as with all tokens, and how many samples they were trained on."""
    config = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    pruner = MergingPruner(config.vision_config.hidden_size, args.key_size, side)
    training = MergingTraining(model, pruner, entropy=args.entropy, column=args.column).train()
    chance = random.Random(args.seed)

    def losses(step: int) -> tuple[Tensor, dict[str, float]]:
        count = drawn(args, chance)
        loss, *parts = training(tokens=count, **next(batches))
        names = ("divergence", "entropy", "column")
        return loss, {**{name: x.item() for name, x in zip(names, parts, strict=True)}, "tokens": count}

    fit(pruner, losses, args.steps, args.learning_rate, log(args))
    return pruner.eval(), args.steps * args.batch


def main() -> None:
    """Train and save."""
    args = options()
    set_seed(args.seed)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).requires_grad_(False).eval()
    dataset = ConversationDataset(args.data, args.images)
    collate = ConversationCollator(AutoProcessor.from_pretrained(args.model))
    chance = random.Random(args.seed)

    def batches():
        while True:
            numbers = one_each(dataset, chance)
            for start in range(0, len(numbers) - args.batch + 1, args.batch):
                yield collate([dataset[number] for number in numbers[start : start + args.batch]])
            if args.kind == SlotPruner.kind:
                return

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
