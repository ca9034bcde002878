"""GLM-4.1V and what follows it: merged patches of images of any size.

The frames of a video stand apart, with a time stamp after each, on the placeholder of images; they share one budget.
"""

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, Adapter, Modality

VIDEO = Modality("video", "get_video_features", "image_token_id")

ADAPTERS = (
    Adapter(model_type="glm4v", family="GLM-4.1V", modalities=(IMAGE, VIDEO), layout=merged),
    Adapter(model_type="glm46v", family="GLM-4.6V", modalities=(IMAGE, VIDEO), layout=merged),
    Adapter(model_type="glmga", family="GLM-GA", modalities=(IMAGE, VIDEO), layout=merged),
    Adapter(model_type="glm4v_moe", family="GLM-4.5V", modalities=(IMAGE, VIDEO), layout=merged),
    Adapter(model_type="glm_ocr", family="GLM-OCR", modalities=(IMAGE, VIDEO), layout=merged),
)
