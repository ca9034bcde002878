"""LFM3-VL: short convolutions, windows of 8 tokens and full attention; merged patches, a video with time stamps."""

from transformers import Lfm3VlConfig

from .common import END, IMAGE, START, VIDEO, Tiny, text_config
from .qwen3_5 import PATCH, ROWS, merged_patches

LAYERS = 8


def config():
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "patch_size": PATCH,
    }  # fmt: skip
    text = text_config("lfm3", num_hidden_layers=LAYERS, head_dim=8, sliding_window=8, tie_word_embeddings=False)
    return Lfm3VlConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END, projector_hidden_size=24, tie_word_embeddings=False,
    )  # fmt: skip


TYPES = {"lfm3_vl": Tiny(config, merged_patches, ROWS, layer=3)}
