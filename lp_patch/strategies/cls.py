"""[CLS] attention of the vision encoder."""

from torch import Tensor

from .base import Scorer, Stage1Input, register


def score(x: Stage1Input) -> Tensor:
    """(B, N) attention that each token receives from [CLS]."""
    assert x.cls_attention is not None  # the attention tap is installed for this scorer
    return x.cls_attention


register(Scorer("cls", "[CLS] attention at the layer the features come from", score, needs_cls_attention=True))
