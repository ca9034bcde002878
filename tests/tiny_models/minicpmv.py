"""MiniCPM-V 4.6, 4.7 and MiniCPM-OCR: images with and without slices, packed patches; a video's wrapped frames."""

from functools import partial

import torch
from transformers import AutoConfig

from .common import END, IMAGE, START, VIDEO, Picture, Tiny, pixels, text, text_config
from .qwen3_5 import TEXT, remember

SLICE_START, SLICE_END, NEWLINE, NUMBER = range(6, 10)
PATCH = 4
MARKS = {
    "image_start_id": START,
    "image_end_id": END,
    "slice_start_id": SLICE_START,
    "slice_end_id": SLICE_END,
    "newline_id": NEWLINE,
}
UNTIED = {"tie_word_embeddings": False}  # tied, the logits would be five times larger


def config(model_type, more):
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 8 * PATCH, "patch_size": PATCH,
    }  # fmt: skip
    return AutoConfig.for_model(
        model_type, vision_config=vision, text_config=text_config("qwen3_5_text", **TEXT), image_token_id=IMAGE,
        video_token_id=VIDEO, insert_layer_id=1, **more,
    )  # fmt: skip


def picture(merged, generator, height, width, rows=0, columns=0, video=False):
    """A number, an overview of height x width tokens, rows x columns slices of 2 x 3 tokens; or a frame of a video."""
    ids = [] if video else [NUMBER, *text(generator, 1), NUMBER]
    visual, patches, sizes = [], [], []

    def crop(opening, closing, h, w):
        ids.append(opening)
        visual.extend(range(len(ids), len(ids) + h * w))
        ids.extend([VIDEO if video else IMAGE] * (h * w) + [closing])
        sizes.append([merged * h, merged * w])
        patches.append(pixels(generator, 1, 3, PATCH, PATCH * merged * merged * h * w))

    crop(START, END, height, width)
    for row in range(rows):
        ids += [NEWLINE] if row else []
        for _ in range(columns):
            crop(SLICE_START, SLICE_END, 2, 3)
    end = "_videos" if video else ""
    inputs = {f"pixel_values{end}": torch.cat(patches, dim=-1), f"target_sizes{end}": torch.tensor(sizes)}
    return Picture(ids, visual, inputs)


def collate(rows):
    """Patches of all pictures in one row; their sizes one below the other."""
    pictures = [picture for row in rows for picture in row]
    names = {name for picture in pictures for name in picture.inputs}
    return {
        name: torch.cat([x.inputs[name] for x in pictures if name in x.inputs], dim=0 if "sizes" in name else -1)
        for name in names
    }


FRAME = (3, 3, 0, 0, True)
ROWS = ((3, (3, 4), 5), (2, (3, 3, 2, 2), (2, 5), 1, FRAME, FRAME, 3), (6,))
TYPES = {
    name: Tiny(
        partial(config, name, more), partial(picture, 2 if name == "minicpm_ocr" else 4), ROWS,
        typed="mm_token_type_ids" if typed else None, positions=not typed, collate=collate, adjust=remember, layer=4,
    )
    for name, typed, more in (("minicpmv4_6", False, {}), ("minicpmv4_7", True, MARKS), ("minicpm_ocr", False, UNTIED))
}  # fmt: skip
