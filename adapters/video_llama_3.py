"""VideoLLaMA 3: images and videos of any size; the frames of a video have their times between them and share a budget.

Tokens that a `video_compression_mask` drops have encoded features and no place in the prompt: such a call is refused.
"""

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTER = Adapter(model_type="video_llama_3", family="VideoLLaMA 3", modalities=(IMAGE, VIDEO), layout=merged)
