"""[CLS] attention of the vision encoder: a ranking, and VisionZip's selection, which is its top."""

from torch import Tensor

from ..select import top_indices
from .base import Reading, Scorer, Stage1Input, register


def score(x: Stage1Input) -> Tensor:
    """(B, N) attention that each token receives from [CLS]."""
    (attention,) = x.attention
    return attention


register(Scorer("cls", "[CLS] attention at the layer the features come from", score, reads=(Reading(),)))
register(
    Scorer(
        "visionzip",
        "VisionZip (2412.04467), its dominant tokens: the ranking of cls without a share for diversity. Its contextual "
        "tokens are left out: they are mixtures, and this engine keeps tokens as they are",
        select=lambda x: top_indices(score(x), x.keep),
        reads=(Reading(),),
    )
)
