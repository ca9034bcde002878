"""LLaVA 1.5: CLIP (or any transformers vision tower), two-layer projector, Llama-like language model.

A Pixtral tower takes images of any size, and gives the projector all of a call's in one row.
"""

from typing import Any

from torch import Tensor, nn

from lp_patch.errors import ConfigError
from lp_patch.layout import Pixels, pages, tiles
from lp_patch.registry import Adapter


def _width(config: Any) -> int:
    layers = config.vision_feature_layer
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


def _pictures(base: Any, arguments: dict[str, Any]) -> list[int] | None:
    sizes = arguments.get("image_sizes")
    if sizes is None:
        return None
    patch = base.vision_tower.patch_size
    return [int(height) // patch * (int(width) // patch) for height, width in sizes.tolist()]


def patches(config: Any) -> int | None:
    """Patches of a picture, or of a tile, from the side of the one size that the tower takes; None: of any size."""
    vision = config.vision_config
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        return None
    return (vision.image_size // vision.patch_size) ** 2


def _fewest(config: Any) -> int | None:
    count = patches(config)
    if count is None:
        return None
    # "default" crops the first token, which is [CLS] where there is one
    has_cls = config.vision_config.model_type == "clip_vision_model"
    return count + has_cls - (config.vision_feature_select_strategy == "default")


def tower(base: Any) -> nn.Module | None:
    """Of which every token attends to all of its picture or tile: not where pictures of all sizes are one row."""
    return None if patches(base.config) is None else base.vision_tower


def _vision_attention(base: nn.Module) -> list[nn.Module]:
    layer, strategy = base.config.vision_feature_layer, base.config.vision_feature_select_strategy
    tower = getattr(base.vision_tower, "vision_model", base.vision_tower)
    if (
        not isinstance(layer, int)
        or layer == 0
        or strategy != "default"
        or not hasattr(tower.embeddings, "class_embedding")
    ):
        raise ConfigError(
            "a scorer that reads [CLS] needs a tower whose [CLS] token is cropped from one feature layer, got "
            f"{type(tower).__name__} with vision_feature_layer={layer}, vision_feature_select_strategy={strategy!r}"
        )
    # hidden_states[i] is the output of encoder layer i - 1; negative i count from the end alike
    layers = list(tower.encoder.layers)
    return [x.self_attn for x in layers[: layer if layer > 0 else len(layers) + 1 + layer]]


def _layout(pixels: Pixels) -> Tensor:
    return pages(pixels) if "image_sizes" in pixels.inputs else tiles(pixels)


ADAPTER = Adapter(
    model_type="llava",
    family="LLaVA",
    projector="multi_modal_projector",
    pictures=_pictures,
    width=_width,
    tower=tower,
    fewest=_fewest,
    vision_attention=_vision_attention,
    layout=_layout,
)
