"""DeepSeek-VL: SigLIP patches, projected one by one; the hybrid joins them with those of a second, finer tower."""

from operator import attrgetter

from lp_patch.adapters.llava import patches
from lp_patch.layout import tiles
from lp_patch.registry import Adapter

ADAPTERS = (
    Adapter(
        model_type="deepseek_vl", family="DeepSeek-VL", tower=attrgetter("vision_model"), fewest=patches, layout=tiles
    ),
    Adapter(model_type="deepseek_vl_hybrid", family="DeepSeek-VL hybrid", fewest=patches, layout=tiles),
)
