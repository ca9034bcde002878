"""Last stage: write weights, configuration, tokenizer and processor as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import network
import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration
from vocabulary import SPECIAL


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
    size = sum(path.stat().st_size for path in folder.iterdir())
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {count / 1e6:.2f} M parameters, {size / 1e6:.1f} MB")
    return model
