"""Nemotron 3 Omni: pixel-shuffled patches; the whole model merges; Mamba, expert and a few attention layers, no rotary.

Images and videos have one placeholder, so a call may show one or the other.
"""

from lp_patch.registry import IMAGE, Adapter, Modality

ADAPTER = Adapter(
    model_type="nemotron_h_omni",
    family="Nemotron 3 Omni",
    modalities=(IMAGE, Modality("video", "get_video_features", "image_token_id")),
    language_model="language_model.model",
    layers="language_model.model.layers",
    attention="mixer",
)
