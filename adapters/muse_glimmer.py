"""Muse Glimmer and Muse Spark: pixel shuffle joins 2 x 2 patches; a video's frames have text between them.

Three layers of four attend to a window; the others have no rotary positions.
"""

from lp_patch.layout import rows_of_patches
from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTERS = (
    Adapter(model_type="muse_glimmer", family="Muse Glimmer", modalities=(IMAGE, VIDEO), layout=rows_of_patches),
    Adapter(model_type="muse_spark", family="Muse Spark", modalities=(IMAGE, VIDEO), layout=rows_of_patches),
)
