"""Last stage: write weights, configuration, tokenizer and processor as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import network
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlavaForConditionalGeneration
from vocabulary import SPECIAL


def make_readable(folder: Path) -> None:
    """Write what transformers 5 saved in names that 4.57 reads as well: 5 maps them, 4.57 would run a wrong model."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    inner = "vision_tower.vision_model."
    renamed = {name.replace("vision_tower.", inner) if inner not in name else name: x for name, x in weights.items()}
    save_file(renamed, path, metadata={"format": "pt"})

    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    text["rope_theta"] = text["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2) + "\n")

    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["extra_special_tokens"] = {"image_token": config.pop("image_token")}
    path.write_text(json.dumps(config, indent=2) + "\n")


def export(weights: dict[str, torch.Tensor], folder: Path) -> LlavaForConditionalGeneration:
    """Save trained weights in bf16."""
    model = network.build()
    model.load_state_dict({name: tensor.float().cpu() for name, tensor in weights.items()})
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
    )
    model.save_pretrained(folder)
    network.processor().save_pretrained(folder)
    make_readable(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {count / 1e6:.2f} M parameters, {size / 1e6:.1f} MB")
    return model
