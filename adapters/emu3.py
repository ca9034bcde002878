"""Emu3: pictures are codes of the vocabulary; each row of one ends in the code of a line break, among the features."""

from typing import Any

import torch
from torch import Tensor

from lp_patch.layout import pages
from lp_patch.registry import Adapter


def line_breaks(base: Any, embeds: Tensor) -> Tensor:
    """Rows of embeds (B, S, D) that are the line break's embedding: (B, S) bool."""
    token = torch.full((), base.vocabulary_mapping.eol_token_id, device=embeds.device)
    return (embeds == base.get_input_embeddings()(token).to(embeds)).all(dim=-1)


ADAPTER = Adapter(
    model_type="emu3",
    family="Emu3",
    structural=line_breaks,
    language_model="text_model",
    layers="text_model.layers",
    rotary="text_model.rotary_emb",
    layout=pages,
)
