"""LFM3-VL: merged patches, images and videos as in Qwen3-VL; convolutions, sliding windows and full attention."""

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTER = Adapter(model_type="lfm3_vl", family="LFM3-VL", modalities=(IMAGE, VIDEO), layout=merged)
