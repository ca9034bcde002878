"""EXAONE 4.5: the Qwen2.5-VL tower before EXAONE 4, whose layers without a window have no rotary positions."""

import torch
from transformers import Exaone4_5_Config, Exaone4_5_VisionConfig

from .common import END, HIDDEN, IMAGE, START, VIDEO, Picture, Tiny, placeholders, text_config

PATCH = 4
WINDOW, FULL = "sliding_attention", "full_attention"


def config():
    vision = Exaone4_5_VisionConfig(
        depth=3, hidden_size=16, intermediate_size=24, num_heads=2, num_key_value_heads=1, patch_size=PATCH,
        window_size=4 * PATCH, out_hidden_size=HIDDEN, fullatt_block_indexes=[2],
    )  # fmt: skip
    text = text_config("exaone4", sliding_window=8, layer_types=[WINDOW, FULL, WINDOW, WINDOW, FULL, WINDOW])
    return Exaone4_5_Config(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO)


def picture(generator, *size):
    """Of h x w merged patches, or t x h x w of a video."""
    *frames, height, width = size
    t = sum(frames) or 1
    values = torch.randn(t * 4 * height * width, 3 * 2 * PATCH**2, generator=generator)
    grid = torch.tensor([[t, 2 * height, 2 * width]])
    if frames:
        inputs = {"pixel_values_videos": values, "video_grid_thw": grid}
    else:
        inputs = {"pixel_values": values, "image_grid_thw": grid}
    return Picture(*placeholders(t * height * width, [START], [END], VIDEO if frames else IMAGE), inputs)


ROWS = ((6, (3, 4), 14), (4, (2, 5), 3, (2, 2, 3), 9), (20,))
TYPES = {"exaone4_5": Tiny(config, picture, rows=ROWS)}
