"""GLM-5.3: merged patches; linear attention, and an indexer that picks pools of keys; four residual streams, no rotary.

Images and videos have one placeholder, so a call may show one or the other.
"""

from lp_patch.registry import IMAGE, Adapter, Modality

ADAPTER = Adapter(
    model_type="glm5_next",
    family="GLM-5.3",
    modalities=(IMAGE, Modality("video", "get_video_features", "image_token_id")),
)
