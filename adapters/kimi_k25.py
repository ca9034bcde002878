"""Kimi K2.5: merged patches of images of any size, over DeepSeek-V3's latent attention.

Four frames of a video become one, with a time stamp before it: to the model, and here, each such is a picture.
"""

from lp_patch.registry import IMAGE, VIDEO, Adapter

ADAPTER = Adapter(model_type="kimi_k25", family="Kimi K2.5", modalities=(IMAGE, VIDEO))
