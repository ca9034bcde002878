"""The one file that looks at library versions and at what moved between them."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask


def causal_mask(config: Any, hidden: Tensor, attention_mask: Tensor | None, cache: Cache | None, layer: int) -> Any:
    """The mask that transformers would hand to decoder layer `layer`, sized for that layer's own keys.

    Args:
        hidden: (B, Q, C), the layer's input; only its shape, dtype and device are read.
        attention_mask: (B, offset + P + Q) over the layer's physical keys, or None if all are real.
    """
    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=attention_mask,
        past_key_values=cache,
        layer_idx=layer,
    )
