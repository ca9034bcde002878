"""Tiny random models and inputs, built from configs: nothing is downloaded."""

import inspect

import pytest
import torch
import transformers
from transformers import CLIPVisionConfig, GenerationMixin, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

# what older transformers cannot do themselves, patched or not
PRE_ENCODES = hasattr(GenerationMixin, "_expand_multimodal_outputs")  # images before the prefill, repeated by prompt
V5 = int(transformers.__version__.split(".")[0]) >= 5
# the cache's name among a forward's arguments and in its output: the newer one from 5.24 on
(CACHE,) = {"cache", "past_key_values"} & set(inspect.signature(LlavaForConditionalGeneration.forward).parameters)
# llava-torch's forward takes what generate() passes: neither transformers 4's cache_position nor a cache of that name
ORIGINAL_GENERATES = V5 and CACHE != "cache"
ORIGINAL_CANNOT = "not applicable: from transformers 5.24 on the package itself cannot generate"
since_5 = pytest.mark.skipif(not V5, reason="transformers 4 generates on a kept cache otherwise")
pre_encodes = pytest.mark.skipif(not PRE_ENCODES, reason="this transformers takes no encoded features")

IMAGE = 1
PAD = 0
EOS = 2
VOCAB = 60
SIDE = 6  # patches per side
N = SIDE * SIDE  # visual tokens of an image
LAYERS = 6
WIDTH = 24  # of the vision features


def features_shown(out, modality="image"):
    """The features (V, C) that a model's output shows; from 5.24 on they stand there one by one."""
    if f"{modality}_outputs" in out:
        return torch.cat([x.flatten(0, -2) for x in out[f"{modality}_outputs"].pooler_output])
    return out[f"{modality}_hidden_states"].flatten(0, -2)


def tiny_llava(seed=0, kv_heads=4, layers=LAYERS, dtype=torch.float64, attention="sdpa", **text):
    """A random LLaVA whose weights are large enough for attention to differ between tokens."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=14 * SIDE,
            patch_size=14,
            projection_dim=WIDTH,
        ),
        text_config=LlamaConfig(
            **{
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "num_key_value_heads": kv_heads,
                "max_position_embeddings": 512,
                "pad_token_id": PAD,
                "bos_token_id": 3,
                "eos_token_id": EOS,
                **text,
            }
        ),
        image_token_id=IMAGE,
        image_seq_length=N,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
            elif "embed" in name:
                parameter.normal_(0, 1.0)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # random models must not stop at random
    model.set_attn_implementation(attention)
    return model


def tokens(*parts, seed=0):
    """Ids of one prompt: ints are so many random text tokens, "image" is an image's placeholders."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for part in parts:
        if part == "image":
            ids += [IMAGE] * N
        else:
            ids += torch.randint(5, VOCAB, (part,), generator=generator).tolist()
    return ids


def images(count, seed=0, dtype=torch.float64):
    """(count, 3, H, W) random pictures, smooth enough for neighbouring patches to resemble each other."""
    generator = torch.Generator().manual_seed(1000 + seed)
    coarse = torch.randn(count, 3, 2 * SIDE, 2 * SIDE, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(14 * SIDE, 14 * SIDE), mode="bilinear").to(dtype)


def batch(rows, pixels, side="left"):
    """Rows of ids, padded on one side: the keyword arguments of a forward or of generate."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    out = {"input_ids": ids, "attention_mask": mask}
    return out if pixels is None else {**out, "pixel_values": pixels}
