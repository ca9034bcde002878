"""LLaVA 1.5 in its authors' own package (PyPI: llava-torch), `LlavaLlamaForCausalLM`.

Its generate() merges before transformers sees anything: each -200 of the prompt becomes all tokens of an image.
"""

from typing import Any

from torch import nn

from lp_patch.errors import ConfigError, UnsupportedModelError
from lp_patch.registry import Adapter, Modality


def _width(config: Any) -> int:
    if getattr(config, "mm_patch_merge_type", "flat") != "flat":
        raise UnsupportedModelError(
            f"mm_patch_merge_type={config.mm_patch_merge_type!r} packs tiles, of which lp_patch cannot tell the line "
            "breaks in this package: use the LLaVA-NeXT of transformers with weights of llava-hf"
        )
    return config.mm_hidden_size


def _vision_attention(base: Any) -> list[nn.Module]:
    tower = base.get_vision_tower()
    layer, selected = tower.select_layer, tower.select_feature
    if selected != "patch" or layer == 0:
        raise ConfigError(
            "a scorer that reads [CLS] needs a tower whose [CLS] token is cropped from a layer, got "
            f"mm_vision_select_feature={selected!r}, mm_vision_select_layer={layer}"
        )
    encoder = getattr(tower.vision_tower, "vision_model", tower.vision_tower).encoder
    # hidden_states[i] is the output of encoder layer i - 1; negative i count from the end alike
    layers = list(encoder.layers)
    return [x.self_attn for x in layers[: layer if layer > 0 else len(layers) + 1 + layer]]


ADAPTER = Adapter(
    model_type="llava_llama",
    family="LLaVA (llava-torch)",
    modalities=(Modality("image", "encode_images", -200),),
    merge="prepare_inputs_labels_for_multimodal",
    projector="model.mm_projector",
    width=_width,
    vision_attention=_vision_attention,
    language_model="model",
    layers="model.layers",
    rotary="model.rotary_emb",
)
