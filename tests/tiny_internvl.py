"""Tiny random InternVL models and their prompts, built from configs: nothing is downloaded."""

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

PAD, EOS, START, END, IMAGE = range(5)
VOCAB = 60
LAYERS = 6
HIDDEN = 32
SIDE = 24  # pixels
N = 9  # tokens of a tile: 6 x 6 patches, of which pixel shuffle joins 2 x 2


def tiny_internvl(seed=0, dtype=torch.float64, attention="sdpa", language="qwen2", **text):
    """A random model, with weights large enough for attention to differ between tokens."""
    torch.manual_seed(seed)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": SIDE,
            "patch_size": 4,
        },
        text_config={
            "model_type": language,
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": PAD,
            "bos_token_id": EOS,
            "eos_token_id": EOS,
            **text,
        },
        image_token_id=IMAGE,
        image_seq_length=N,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(0, 1.0)
            elif parameter.dim() > 1:
                parameter.normal_(0, 1.2 * parameter[0].numel() ** -0.5)
            elif "lambda" in name:
                parameter.fill_(1.0)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # random models must not stop at random
    model.generation_config.suppress_tokens = [PAD, START, END, IMAGE]  # nor speak of pictures
    model.set_attn_implementation(attention)
    return model


def prompt(*parts, seed=0):
    """One row: an int is so many text tokens, ("image", n) a picture of n tiles, ("video", n) one of n frames."""
    generator = torch.Generator().manual_seed(seed)
    row = {"ids": [], "tiles": [], "visual": []}
    for part in parts:
        if isinstance(part, int):
            row["ids"] += torch.randint(5, VOCAB, (part,), generator=generator).tolist()
            continue
        name, count = part
        # the frames of a video have text between them: to the model each is an image of one tile
        for tiles in [count] if name == "image" else [1] * count:
            row["tiles"].append(torch.randn(tiles, 3, SIDE, SIDE, generator=generator))
            first = len(row["ids"]) + 1
            row["ids"] += [START] + [IMAGE] * (tiles * N) + [END]
            row["visual"].append(list(range(first, first + tiles * N)))
    return row


def visual(rows, side="left"):
    """Rows -> images -> the positions of their tokens in the padded batch."""
    length = max(len(row["ids"]) for row in rows)
    shifts = [length - len(row["ids"]) if side == "left" else 0 for row in rows]
    return [[[p + shift for p in x] for x in row["visual"]] for row, shift in zip(rows, shifts, strict=True)]


def batch(rows, dtype=torch.float64, side="left"):
    """Rows padded on one side: the keyword arguments of a forward or of generate."""
    length = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row["ids"]), length) if side == "left" else slice(0, len(row["ids"]))
        ids[i, where] = torch.tensor(row["ids"])
        mask[i, where] = 1
    tiles = [tile for row in rows for tile in row["tiles"]]
    return {"input_ids": ids, "attention_mask": mask} | ({"pixel_values": torch.cat(tiles).to(dtype)} if tiles else {})
