"""Tiny random checkpoints with their real processors, as folders that vLLM and transformers load alike."""

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

WORDS = 60
SPECIAL = {
    "qwen": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "internvl": ["<IMG_CONTEXT>", "<video>", "<img>", "</img>"],
    "llava": ["<image>", "<unused>", "<unused1>", "<unused2>"],
}
PLACE = {
    "qwen2_5_vl": "<|vision_start|> <|image_pad|> <|vision_end|>",
    "qwen3_vl": "<|vision_start|> <|image_pad|> <|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
    "llava": "<image>",
}
TEXT = {
    "vocab_size": WORDS + 6,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
GRID = {"depth": 3, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
CONFIGS = {
    "qwen2_5_vl": {
        "vision_config": {
            **GRID, "hidden_size": 64, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 16,
            "fullatt_block_indexes": [2],
        },
        "text_config": {**TEXT, **MROPE},
        "image_token_id": 2, "video_token_id": 3, "vision_start_token_id": 4, "vision_end_token_id": 5,
    },
    "qwen3_vl": {
        "vision_config": {
            **GRID, "hidden_size": 64, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        "text_config": {
            **TEXT, "rope_parameters": {**MROPE["rope_parameters"], "mrope_interleaved": True}, "head_dim": 32,
        },
        "image_token_id": 2, "video_token_id": 3, "vision_start_token_id": 4, "vision_end_token_id": 5,
    },
    "internvl": {
        "vision_config": {
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
            "image_size": [24, 24], "patch_size": [4, 4],
        },
        "text_config": {"model_type": "qwen2", **TEXT, **PLAIN},
        "image_token_id": 2, "image_seq_length": 9,
    },
    "llava": {
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 48, "image_size": 24, "patch_size": 4,
        },
        "text_config": {"model_type": "llama", **TEXT, **PLAIN},
        "image_token_index": 2, "image_seq_length": 36,
    },
}  # fmt: skip


def tokenizer(kind):
    """Words w0, w1, ... and the kind's special tokens."""
    special = ["<pad>", "<eos>", *SPECIAL["qwen" if kind.startswith("qwen") else kind]]
    vocabulary = {word: n for n, word in enumerate([*special, *(f"w{n}" for n in range(WORDS))])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    named = {"image_token": special[2], "video_token": special[3]}
    if kind == "internvl":
        names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
        named = dict(zip(names, ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"), strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>",
        additional_special_tokens=special[2:],
        extra_special_tokens=named,
        clean_up_tokenization_spaces=False,
    )


def processor(kind):
    """The family's own, for pictures of a few patches."""
    words = tokenizer(kind)
    if kind.startswith("qwen"):
        name = "Qwen2_5_VLProcessor" if kind == "qwen2_5_vl" else "Qwen3VLProcessor"
        size = {"shortest_edge": 64, "longest_edge": 4096}
        options = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": size}
        video = "Qwen2VLVideoProcessor" if kind == "qwen2_5_vl" else "Qwen3VLVideoProcessor"
        return getattr(transformers, name)(
            image_processor=transformers.Qwen2VLImageProcessor(**options),
            tokenizer=words,
            video_processor=getattr(transformers, video)(**options),
        )
    if kind == "internvl":
        side = {"height": 24, "width": 24}
        return transformers.InternVLProcessor(
            image_processor=transformers.GotOcr2ImageProcessor(
                size=side, crop_to_patches=True, min_patches=1, max_patches=4
            ),
            tokenizer=words,
            video_processor=transformers.InternVLVideoProcessor(size=side),
            image_seq_length=9,
        )
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def save(kind, folder):
    """Write the checkpoint of a kind, with weights large enough for attention to differ between tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **CONFIGS[kind])
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(0, 1.0)
            elif parameter.dim() > 1:
                parameter.normal_(0, 1.2 * parameter[0].numel() ** -0.5)
            elif "lambda" in name:
                parameter.fill_(1.0)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor(kind).save_pretrained(folder)
