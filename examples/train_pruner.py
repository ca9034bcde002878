"""Train a pruner for any supported checkpoint on conversations in LLaVA's format.

    python examples/train_pruner.py llava-hf/llava-1.5-7b-hf llava_v1_5_mix665k.json --images data --output pruner

The output folder is what `lp_patch.apply(model, pruner=...)` takes. Interrupted, the same command goes on from the last
checkpoint; `torchrun --nproc-per-node N examples/train_pruner.py ...` uses N devices.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from transformers.trainer_utils import get_last_checkpoint

from lp_patch import LearnablePruner
from lp_patch.training import (
    ConversationCollator,
    ConversationDataset,
    GatedModel,
    PrunerTrainer,
    training_arguments,
)


def options() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint: a Hub id or a folder")
    parser.add_argument("data", type=Path, help="JSON file in LLaVA's conversation format")
    parser.add_argument("--images", type=Path, help="folder that image names start from (default: the JSON's own)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pruner; checkpoints go below it")
    parser.add_argument("--share", type=float, default=0.1, help="of the samples with images (paper: 0.1)")
    parser.add_argument("--objective", choices=["ntp", "distill"], default="ntp", help="ntp is the paper's")
    parser.add_argument("--weight", type=float, default=1.0, help="of the budget term (paper: 1)")
    parser.add_argument("--tau", type=float, default=0.0, help="share of tokens that costs nothing (paper: 0)")
    parser.add_argument("--difference", action="store_true", help="the gate's gradient as a difference, bounded (ours)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="samples a device at once")
    parser.add_argument(
        "--accumulate",
        type=int,
        default=1,
        help="batches a step, equal to a larger batch (paper-like: 64 samples a step)",
    )
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=-1, help="updates (default: one epoch of the share)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of the base model"
    )
    parser.add_argument(
        "--max-length", type=int, help="cut conversations to so many tokens; one without answers is skipped"
    )
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing: less memory, more time")
    parser.add_argument("--pruner", help="start from this pruner: a folder or Hub id")
    parser.add_argument("--lora-rank", type=int, default=0, help="heal the language model with LoRA of this rank")
    parser.add_argument("--freeze-pruner", action="store_true", help="train LoRA alone, for a trained --pruner")
    parser.add_argument("--save-steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1, help="processes that load pictures")
    return parser.parse_args()


def main() -> None:
    """Train, or go on, and save."""
    args = options()
    set_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype).requires_grad_(False)
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        layers = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        model = get_peft_model(
            model, LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=layers)
        )
    pruner = LearnablePruner.from_pretrained(args.pruner) if args.pruner else None
    gated = GatedModel(
        model, pruner, objective=args.objective, weight=args.weight, tau=args.tau, difference=args.difference
    )
    gated.pruner.requires_grad_(not args.freeze_pruner)
    if args.checkpointing:
        gated.activation_checkpointing_enable()
    dataset = ConversationDataset(args.data, args.images, share=args.share, seed=args.seed)
    print(f"{len(dataset)} samples ({dataset.skipped} without an image skipped)")
    gated.pruner.base_model, gated.pruner.model_type = args.model, gated.config.model_type
    gated.pruner.training_info = {
        "objective": args.objective,
        "data": args.data.name,
        **{
            name: getattr(args, name)
            for name in ("seed", "weight", "tau", "difference", "steps", "batch", "accumulate")
        },
        "learning_rate": args.learning_rate,
    }
    trainer = PrunerTrainer(
        gated,
        training_arguments(
            args.output / "checkpoints",
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulate,
            max_steps=args.steps,
            save_steps=args.save_steps,
            save_total_limit=2,
            seed=args.seed,
            dataloader_num_workers=args.workers,
            report_to=[],
        ),
        train_dataset=dataset,
        data_collator=ConversationCollator(
            AutoProcessor.from_pretrained(args.model), max_length=args.max_length, dtype=dtype
        ),
    )
    checkpoints = args.output / "checkpoints"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    gated.pruner.training_info["samples"] = round(trainer.state.epoch * len(dataset)) - trainer.skipped
    gated.pruner.training_info["skipped"] = trainer.skipped
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
