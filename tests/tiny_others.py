"""Tiny random Mistral 3, Idefics3 and SmolVLM models and their prompts, built from configs: nothing is downloaded."""

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

PAD, EOS, IMAGE, FAKE, TILE, WHOLE, LINE = range(7)
VOCAB = 60
HIDDEN = 32
SIDE, PATCH = 24, 4
N = 9  # tokens of a tile of Idefics3 and SmolVLM
KINDS = {
    "mistral3": (Mistral3ForConditionalGeneration, Mistral3Config),
    "idefics3": (Idefics3ForConditionalGeneration, Idefics3Config),
    "smolvlm": (SmolVLMForConditionalGeneration, SmolVLMConfig),
}


def tiny(kind, seed=0, dtype=torch.float64, attention="sdpa", **text):
    """A random model, with weights large enough for attention to differ between tokens."""
    torch.manual_seed(seed)
    model_class, config_class = KINDS[kind]
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": PAD, "bos_token_id": EOS,
        "eos_token_id": EOS, **text,
    }  # fmt: skip
    if kind == "mistral3":
        config = config_class(
            vision_config={"model_type": "pixtral", "head_dim": 8, "patch_size": PATCH, "image_size": 64, **vision},
            text_config={"model_type": "mistral", "head_dim": 8, "sliding_window": None, **text},
            image_token_index=IMAGE,
            spatial_merge_size=2,
            tie_word_embeddings=False,
        )
    else:
        config = config_class(
            vision_config={"patch_size": PATCH, "image_size": SIDE, **vision},
            text_config={"model_type": "llama", **text},
            image_token_id=IMAGE,
            scale_factor=2,
        )
    model = model_class(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(0, 1.0)
            elif parameter.dim() > 1:
                parameter.normal_(0, 1.2 * parameter[0].numel() ** -0.5)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # random models must not stop at random
    model.generation_config.suppress_tokens = [PAD, IMAGE, FAKE, TILE, WHOLE, LINE]  # nor speak of pictures
    model.set_attn_implementation(attention)
    return model


def prompt(kind, *parts, seed=0):
    """One row: an int is so many text tokens, ("image", h, w) one of h x w tiles (Mistral 3: merged patches)."""
    generator = torch.Generator().manual_seed(seed)
    row = {"ids": [], "images": [], "sizes": [], "visual": []}

    def tokens(count):
        start = len(row["ids"])
        row["visual"][-1] += range(start, start + count)
        row["ids"] += [IMAGE] * count

    for part in parts:
        if isinstance(part, int):
            row["ids"] += torch.randint(7, VOCAB, (part,), generator=generator).tolist()
            continue
        _, h, w = part
        row["visual"].append([])
        if kind == "mistral3":
            row["sizes"].append([2 * PATCH * h, 2 * PATCH * w])
            row["images"].append(torch.randn(1, 3, *row["sizes"][-1], generator=generator))
            for _ in range(h):
                tokens(w)
                row["ids"].append(LINE)
            continue
        # as the processor writes it: rows of tiles, then the whole image; a small picture is the whole image alone
        if h * w > 1:
            for _ in range(h):
                for _ in range(w):
                    row["ids"] += [FAKE, TILE]
                    tokens(N)
                row["ids"].append(LINE)
            row["ids"].append(LINE)
        row["ids"] += [FAKE, WHOLE]
        tokens(N)
        row["ids"].append(FAKE)
        tiles = 1 if h * w == 1 else h * w + 1
        row["images"].append(torch.randn(tiles, 3, SIDE, SIDE, generator=generator))
    return row


def visual(rows, side="left"):
    """Rows -> images -> the positions of their tokens in the padded batch."""
    length = max(len(row["ids"]) for row in rows)
    shifts = [length - len(row["ids"]) if side == "left" else 0 for row in rows]
    return [[[p + shift for p in x] for x in row["visual"]] for row, shift in zip(rows, shifts, strict=True)]


def batch(kind, rows, dtype=torch.float64, side="left"):
    """Rows padded on one side: the keyword arguments of a forward or of generate."""
    length = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row["ids"]), length) if side == "left" else slice(0, len(row["ids"]))
        ids[i, where] = torch.tensor(row["ids"])
        mask[i, where] = 1
    out = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    images = [image for row in rows for image in row["images"]]
    if not images:
        return out
    if kind == "mistral3":
        sizes = torch.tensor([size for row in rows for size in row["sizes"]])
        pixels = torch.zeros(len(images), 3, *sizes.amax(dim=0).tolist())
        for i, image in enumerate(images):
            pixels[i, :, : image.shape[2], : image.shape[3]] = image[0]
        return {**out, "pixel_values": pixels.to(dtype), "image_sizes": sizes}
    tiles = [torch.cat(row["images"]) if row["images"] else torch.zeros(0, 3, SIDE, SIDE) for row in rows]
    pixels = torch.zeros(len(rows), max(map(len, tiles)), 3, SIDE, SIDE)
    for i, own in enumerate(tiles):
        pixels[i, : len(own)] = own
    return {**out, "pixel_values": pixels.to(dtype)}
