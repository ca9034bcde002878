"""LearnPruner's stage 2 (arXiv 2604.23950, section 3): the text asks."""

import torch
from torch import Tensor

from .base import TextScorer, register


def text_query_weights(is_text: Tensor, is_visual: Tensor, kept: Tensor | None = None) -> Tensor:
    """Equal weight on every text token after the last visual token of its row (LearnPruner, section 3; set: ours).

    Text before an image contributes exactly zero under the causal mask; text between the frames of a video does not
    ask either, even where nothing is left of the last frame. A row without text after its images asks with its last
    token that is left, so that the query set is never empty.

    Args:
        is_text: (B, S) bool, real tokens that are not visual.
        is_visual: (B, S) bool, visual tokens of the prompt.
        kept: (B, S) bool, tokens that are left; None: all.

    Returns:
        (B, S) float32; each row that holds a token sums to 1.
    """
    positions = torch.arange(is_text.shape[1], device=is_text.device)
    last_visual = torch.where(is_visual, positions, -1).amax(dim=1, keepdim=True)
    queries = is_text & (positions > last_visual)
    left = is_text | is_visual if kept is None else (is_text | is_visual) & kept
    last_left = torch.where(left, positions, -1).amax(dim=1, keepdim=True)
    queries = queries | ((positions == last_left) & ~queries.any(dim=1, keepdim=True))
    return queries.float() / queries.sum(dim=1, keepdim=True).clamp(min=1)


register(
    TextScorer(
        "text", "LearnPruner (2604.23950), section 3: attention from the text after the images", text_query_weights
    )
)
