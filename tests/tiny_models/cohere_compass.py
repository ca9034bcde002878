"""North Micro Vision: DeepStack, three axes of positions in layers with a window, none in the others."""

from functools import partial

from transformers import AutoConfig

from .common import END, IMAGE, START, VIDEO, Tiny, text_config
from .cosmos3 import picture
from .glm4v import count, vision

WINDOW, FULL = "sliding_attention", "full_attention"


def config():
    text = text_config(
        "cohere_compass_text", sliding_window=8, layer_types=[WINDOW, FULL, WINDOW, WINDOW, FULL, WINDOW],
        rope_parameters={
            WINDOW: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            FULL: None,
        },
    )  # fmt: skip
    tower = vision(num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    return AutoConfig.for_model(
        "cohere_compass", vision_config=tower, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip


ROWS = ((6, (3, 4), 14), (4, (2, 5), 3, (2, 2, 3), 9), (20,))
TYPES = {
    "cohere_compass": Tiny(
        config, partial(picture, channels=6), rows=ROWS, typed="mm_token_type_ids", positions=False, adjust=count
    )
}
