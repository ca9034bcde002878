"""Tiny random Qwen-VL models and their prompts, built from configs: nothing is downloaded."""

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

PAD, EOS, START, END, IMAGE, VIDEO = range(6)
VOCAB = 60
LAYERS = 6
HIDDEN = 32
DEEPSTACK = 2  # features that Qwen3-VL's first decoder layers add
PATCH = 4
KINDS = {
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig),
    "qwen2_vl": (Qwen2VLForConditionalGeneration, Qwen2VLConfig),
    "qwen3_vl": (Qwen3VLForConditionalGeneration, Qwen3VLConfig),
    "qwen3_vl_moe": (Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig),
}


def tiny_qwen(kind, seed=0, dtype=torch.float64, attention="sdpa", **text):
    """A random model of one kind, with weights large enough for attention to differ between tokens."""
    torch.manual_seed(seed)
    model_class, config_class = KINDS[kind]
    vision = {"depth": 3, "num_heads": 2, "patch_size": PATCH, "temporal_patch_size": 2, "spatial_merge_size": 2}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 16, "hidden_size": HIDDEN, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": HIDDEN}
    if kind == "qwen2_5_vl":
        vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [2]}  # windows of 2 x 2 merged patches
    if kind.startswith("qwen3"):
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": list(range(DEEPSTACK))}
        text = {"head_dim": 8, **text}
    if kind == "qwen3_vl_moe":
        text = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **text}
    config = config_class(
        vision_config=vision,
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "pad_token_id": PAD,
            "bos_token_id": EOS,
            "eos_token_id": EOS,
            **text,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    model = model_class(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(0, 1.0)
            elif parameter.dim() > 1:
                fan_in = parameter.shape[-1] if "experts" in name else parameter[0].numel()
                parameter.normal_(0, 1.2 * fan_in**-0.5)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # random models must not stop at random
    model.generation_config.suppress_tokens = [PAD, START, END, IMAGE, VIDEO]  # nor speak of pictures
    model.set_attn_implementation(attention)
    if kind == "qwen3_vl_moe":
        model.set_experts_implementation("eager")  # the default computes in no float64
    return model


def prompt(kind, *parts, seed=0):
    """One row: an int is so many text tokens, ("image", h, w) and ("video", t, h, w) count merged patches."""
    generator = torch.Generator().manual_seed(seed)
    row = {"ids": [], "types": [], "image": [], "video": [], "grid": {"image": [], "video": []}, "visual": []}

    def add(ids, kind_of_token):
        row["ids"] += ids
        row["types"] += [kind_of_token] * len(ids)

    def text(count):
        add(torch.randint(6, VOCAB, (count,), generator=generator).tolist(), 0)

    for part in parts:
        if isinstance(part, int):
            text(part)
            continue
        name, *size = part
        t, h, w = size if name == "video" else (1, *size)
        row["grid"][name].append([t, 2 * h, 2 * w])
        row[name].append(torch.randn(t * 4 * h * w, 3 * 2 * PATCH * PATCH, generator=generator))
        # Qwen3-VL puts a time stamp before every frame
        frames = t if name == "video" and kind.startswith("qwen3") else 1
        row["visual"].append([])
        for _ in range(frames):
            if frames > 1:
                text(2)
            add([START], 0)
            count, start = t * h * w // frames, len(row["ids"])
            row["visual"][-1] += range(start, start + count)
            add([IMAGE if name == "image" else VIDEO] * count, 1 if name == "image" else 2)
            add([END], 0)
    return row


def visual(rows, side="left"):
    """Rows -> images and videos -> the positions of their tokens in the padded batch."""
    length = max(len(row["ids"]) for row in rows)
    shifts = [length - len(row["ids"]) if side == "left" else 0 for row in rows]
    return [[[p + shift for p in x] for x in row["visual"]] for row, shift in zip(rows, shifts, strict=True)]


def batch(rows, dtype=torch.float64, side="left"):
    """Rows padded on one side: the keyword arguments of a forward or of generate."""
    length = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    types = torch.zeros(len(rows), length, dtype=torch.int)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row["ids"])
        where = slice(length - n, length) if side == "left" else slice(0, n)
        ids[i, where] = torch.tensor(row["ids"])
        types[i, where] = torch.tensor(row["types"], dtype=torch.int)
        mask[i, where] = 1
    out = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
    for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids := [g for row in rows for g in row["grid"][name]]:
            out[pixels] = torch.cat([p for row in rows for p in row[name]]).to(dtype)
            out[f"{name}_grid_thw"] = torch.tensor(grids)
    return out
