"""Vision models over Cohere 2: tiles, each before a line break, or, in Aya Vision, behind a token that names it.

Layers with a window have rotary positions, those without have none. Aya Vision comes over Llama too.
"""

from functools import partial

from transformers import AyaVisionConfig, Cohere2VisionConfig, SiglipVisionConfig

from .common import END, FIRST, IMAGE, START, Picture, Tiny, pixels, text_config

SIDE, PATCH = 6, 4  # patches of a tile, of which 2 x 2 make a token; pixels
TOKENS = (SIDE // 2) ** 2
LINE, WHOLE = FIRST - 1, FIRST - 2
WINDOW, FULL = "sliding_attention", "full_attention"


def given(text=None):
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=PATCH,
        image_size=SIDE * PATCH,
    )  # fmt: skip
    windows = {"sliding_window": 8, "layer_types": [WINDOW, FULL, WINDOW, WINDOW, FULL, WINDOW]}
    return {"vision_config": vision, "text_config": text or text_config("cohere2", **windows)}


def config():
    return Cohere2VisionConfig(**given(), image_token_id=IMAGE, alignment_intermediate_size=48)


def aya_config(**text):
    return AyaVisionConfig(**given(**text), image_token_index=IMAGE)


def picture(generator, tiles, aya=False):
    if aya:
        ids = [x for number in range(tiles) for x in [6 if number < tiles - 1 else WHOLE, *[IMAGE] * TOKENS]]
    else:
        ids = [*[IMAGE] * TOKENS, LINE] * tiles
    ids = [START, *ids, END]
    visual = [i for i, x in enumerate(ids) if x == IMAGE]
    return Picture(ids, visual, {"pixel_values": pixels(generator, tiles, 3, SIDE * PATCH, SIDE * PATCH)})


ROWS = ((6, (2,), 14), (4, (1,), (3,), 9), (20,))
TYPES = {
    "cohere2_vision": Tiny(config, picture, rows=ROWS),
    "aya_vision": Tiny(aya_config, partial(picture, aya=True), rows=ROWS),
    "aya_vision:llama": Tiny(partial(aya_config, text=text_config("llama")), partial(picture, aya=True), rows=ROWS),
}
