"""PaddleOCR-VL: a tower that keeps each image's own grid, a projector that merges 2 x 2 patches."""

from transformers import PaddleOCRVLConfig

from .common import END, IMAGE, START, VIDEO, Picture, Tiny, placeholders, text_config
from .glm4v import AXES, PATCH, ROWS, count, grid


def config():
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 8 * PATCH, "patch_size": PATCH, "spatial_merge_size": 2,
    }  # fmt: skip
    return PaddleOCRVLConfig(
        vision_config=vision, text_config=text_config("paddleocr_vl_text", head_dim=8, rope_parameters=AXES),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip


def picture(generator, height, width):
    given = grid(generator, height, width, channels=3)
    given["pixel_values"] = given["pixel_values"].view(-1, 3, PATCH, PATCH)
    return Picture(*placeholders(height * width, [START], [END]), given)


TYPES = {"paddleocr_vl": Tiny(config, picture, rows=ROWS, typed="mm_token_type_ids", positions=False, adjust=count)}
