"""EXAONE 4.5: Qwen2.5-VL's tower and merger; three layers of four attend to a window."""

from lp_patch.layout import merged
from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTER = Adapter(model_type="exaone4_5", family="EXAONE 4.5", modalities=(IMAGE, VIDEO), layout=merged)
