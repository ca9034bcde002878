"""Step 3.7: crops of an image and the whole are one feature, with tokens between them in the prompt."""

from lp_patch.registry import Adapter

ADAPTER = Adapter(model_type="step3p7", family="Step 3.7")
