"""Nemotron 3 Omni: pixel-shuffled patches; the whole model merges; Mamba, expert and a few attention layers, no rotary.

Images and videos have one placeholder, so a call may show one or the other.
"""

from typing import Any

from torch import Tensor

from lp_patch.errors import UnsupportedModelError
from lp_patch.layout import Pixels, join
from lp_patch.registry import IMAGE, Adapter, Modality


def _width(config: Any) -> int:
    if config.video_pruning_rate > 0:
        raise UnsupportedModelError(
            f"video_pruning_rate={config.video_pruning_rate}: the model drops tokens of videos itself, which shortens "
            "the prompt in a way that lp_patch cannot follow. Set it to 0 in the config"
        )
    return config.text_config.hidden_size


def _layout(pixels: Pixels) -> Tensor:
    return join(pixels.main.flatten(1), [(int(h), int(w)) for h, w in pixels.about("grid_hw").tolist()], pixels.count)


ADAPTER = Adapter(
    model_type="nemotron_h_omni",
    family="Nemotron 3 Omni",
    modalities=(IMAGE, Modality("video", "get_video_features", "image_token_id")),
    language_model="language_model.model",
    layers="language_model.model.layers",
    attention="mixer",
    rotary=None,
    width=_width,
    layout=_layout,
)
