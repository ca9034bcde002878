"""VideoLLaMA 3: grids of patches; an image keeps all of them, a video's frame a quarter."""

import torch
from transformers import VideoLlama3Config

from .common import IMAGE, VIDEO, Picture, Tiny, placeholders, text, text_config

PATCH = 4


def config():
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": PATCH,
    }  # fmt: skip
    return VideoLlama3Config(
        vision_config=vision, text_config=text_config("qwen2"), image_token_id=IMAGE, video_token_id=VIDEO
    )


def picture(generator, kind, frames, height, width):
    """`height` x `width` tokens a frame."""
    merge = 2 if kind == "video" else 1
    grid = [frames, merge * height, merge * width]
    pixels = torch.randn(frames * merge**2 * height * width, 3 * PATCH**2, generator=generator)
    name = "pixel_values" if kind == "image" else "pixel_values_videos"
    inputs = {name: pixels, f"{kind}_grid_thw": torch.tensor([grid]), f"{kind}_merge_sizes": torch.tensor([merge])}
    if kind == "image":
        return Picture(*placeholders(height * width), inputs)
    ids, visual = [], []
    for _ in range(frames):
        time = text(generator, 2)  # the processor tells when each frame was
        own, at = placeholders(height * width, before=time, token=VIDEO)
        visual += [len(ids) + x for x in at]
        ids += own
    return Picture(ids, visual, inputs)


TYPES = {
    "video_llama_3": Tiny(
        config,
        picture,
        rows=((3, ("image", 1, 4, 4), 5), (2, ("image", 1, 3, 5), 1, ("video", 2, 2, 4), 3), (6,)),
    )
}
