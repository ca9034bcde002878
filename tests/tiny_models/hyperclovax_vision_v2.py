"""HyperCLOVA X SEED Think: Qwen2.5-VL's tower, a linear layer, positions of one axis."""

from transformers import HyperCLOVAXVisionV2Config

from .common import END, HIDDEN, IMAGE, START, VIDEO, Picture, Tiny, placeholders, text_config
from .glm4v import FILMS, PATCH, grid, vision


def config():
    tower = vision(model_type="qwen2_5_vl_vision", window_size=4 * PATCH, fullatt_block_indexes=[1])
    return HyperCLOVAXVisionV2Config(
        vision_config={**tower, "out_hidden_size": HIDDEN // 2}, text_config=text_config("hyperclovax", head_dim=8),
        image_token_id=IMAGE, video_token_id=VIDEO,
    )  # fmt: skip


def picture(generator, height, width, frames=0):
    count, token = height * width * max(1, frames), VIDEO if frames else IMAGE
    return Picture(*placeholders(count, [START], [END], token), grid(generator, height, width, frames))


TYPES = {"hyperclovax_vision_v2": Tiny(config, picture, rows=FILMS)}
