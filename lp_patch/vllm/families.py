"""The pruned twins of vLLM's models: where stage 1 reads, and what stock classes they stand before."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapters.internvl import ADAPTER as INTERNVL
from ..adapters.llava import ADAPTER as LLAVA
from ..errors import ConfigError
from ..score import received_in_tower
from ..strategies import Reading
from .internals import (
    MULTIMODAL_REGISTRY,
    SupportsMRoPE,
    VllmConfig,
    lacks,
    tensor_model_parallel_all_reduce,
)
from .model import PrunedModel
from .processing import PrunedInfo, PrunedProcessor

try:
    from vllm.model_executor.models.interns1 import (
        InternS1DummyInputsBuilder,
        InternS1ForConditionalGeneration,
        InternS1MultiModalProcessor,
        InternS1ProcessingInfo,
    )
    from vllm.model_executor.models.llava import (
        LlavaDummyInputsBuilder,
        LlavaForConditionalGeneration,
        LlavaMultiModalProcessor,
        LlavaProcessingInfo,
    )
    from vllm.model_executor.models.qwen2_5_vl import (
        Qwen2_5_VLDummyInputsBuilder,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLMultiModalProcessor,
        Qwen2_5_VLProcessingInfo,
    )
    from vllm.model_executor.models.qwen3_vl import (
        Qwen3VLDummyInputsBuilder,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMultiModalProcessor,
        Qwen3VLProcessingInfo,
    )
except ImportError as error:
    raise lacks(error) from error


def pruned(processor: type, info: type, dummy_inputs: type) -> Any:
    """The class decorator with which vLLM knows how prompts of a pruned model are prepared."""
    return MULTIMODAL_REGISTRY.register_processor(
        type(f"Pruned{processor.__name__}", (PrunedProcessor, processor), {}),
        info=type(f"Pruned{info.__name__}", (PrunedInfo, info), {}),
        dummy_inputs=dummy_inputs,
    )


@pruned(LlavaMultiModalProcessor, LlavaProcessingInfo, LlavaDummyInputsBuilder)
class LpPatchLlavaForConditionalGeneration(PrunedModel, LlavaForConditionalGeneration, SupportsMRoPE):
    """LLaVA 1.5: stage 1 stands before the projector, and may read [CLS]."""

    supports_encoder_tp_data = True  # vLLM's CLIP does; each process then encodes all pictures

    # since 5, transformers saves a tower without "vision_model." in its names
    hf_to_vllm_mapper = type(LlavaForConditionalGeneration.hf_to_vllm_mapper)(
        orig_to_new_prefix={
            **{
                f"{before}vision_tower.{part}": f"vision_tower.vision_model.{part}"
                for before in ("model.", "")
                for part in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
            },
            **LlavaForConditionalGeneration.hf_to_vllm_mapper.orig_to_new_prefix,
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.seen: dict[Reading, Tensor] = {}
        readings = self.pruning.scorer.reads
        if not readings:
            return
        config = self.config
        if (
            config.vision_config.model_type != "clip_vision_model"
            or not isinstance(config.vision_feature_layer, int)
            or config.vision_feature_select_strategy != "default"
        ):
            raise ConfigError(
                f"scorer={self.pruning.scorer.name!r} needs a CLIP tower whose [CLS] is cropped from one feature layer"
            )
        layers = list(self.vision_tower.vision_model.encoder.layers)  # no further than the features' own
        for reading in readings:
            attention = layers[max(1, round(reading.depth * len(layers))) - 1].self_attn
            attention.register_forward_pre_hook(partial(self.observe, reading), with_kwargs=True)

    def observe(self, reading: Reading, attention: Any, args: tuple, kwargs: dict) -> None:
        """What a vision layer's attention is given (B, 1 + N, C), [CLS] first: note what the scorer reads there."""
        hidden = args[0] if args else kwargs["hidden_states"]
        query, key = (
            x.unflatten(2, (attention.num_heads_per_partition, -1)).transpose(1, 2)
            for x in attention.qkv_proj(hidden)[0].chunk(3, dim=2)[:2]
        )
        received = received_in_tower(query, key, attention.scale, reading.of)
        if attention.tp_size > 1:  # each process has some of the heads
            received = tensor_model_parallel_all_reduce(received.contiguous()) / attention.tp_size
        self.seen[reading] = received

    def encode(self, **kwargs: Any) -> tuple[Sequence[Tensor], dict[Reading, Sequence[Tensor]]]:
        """Features (N, C) of the tower, and the attention (N,) that its tokens receive."""
        pictures = self._parse_and_validate_image_input(**kwargs)
        return list(self._process_image_pixels(pictures)), {of: list(x) for of, x in self.seen.items()}

    def project(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """(R1, C) of each -> (R1, D), all at once: they are equally many."""
        return list(self.multi_modal_projector(torch.stack(list(features))))

    def advance(self, data: Any) -> int:
        """All pictures are of one size."""
        return LLAVA.fewest(self.config)


@pruned(InternS1MultiModalProcessor, InternS1ProcessingInfo, InternS1DummyInputsBuilder)
class LpPatchInternVLForConditionalGeneration(PrunedModel, InternS1ForConditionalGeneration, SupportsMRoPE):
    """InternVL as transformers saves it: the tiles of a picture share one budget."""

    def advance(self, data: Any) -> int:
        """The tokens of all its tiles."""
        return int(data["image_num_patches"].data) * INTERNVL.fewest(self.config)


class GridModel(PrunedModel):
    """Pictures have rows and columns in the language model too: three axes of position ids, the first one constant."""

    axes = 2

    def grid(self, grid_thw: Tensor) -> tuple[int, int]:
        """(rows, columns) of merged patches."""
        merge = self.config.vision_config.spatial_merge_size  # type: ignore[attr-defined]
        return int(grid_thw[1]) // merge, int(grid_thw[2]) // merge

    def placed(self, index: Tensor, picture: int, **kwargs: Any) -> Tensor:
        """(R1, 2): row and column of the tokens `index` (R1,)."""
        columns = self.grid(kwargs["image_grid_thw"][picture])[1]
        return torch.stack([index // columns, index % columns], dim=1)

    def advance(self, data: Any) -> int:
        """The longer side."""
        return max(self.grid(data["image_grid_thw"].data))


@pruned(Qwen2_5_VLMultiModalProcessor, Qwen2_5_VLProcessingInfo, Qwen2_5_VLDummyInputsBuilder)
class LpPatchQwen2_5_VLForConditionalGeneration(GridModel, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL: stage 1 reads merged patches."""


@pruned(Qwen3VLMultiModalProcessor, Qwen3VLProcessingInfo, Qwen3VLDummyInputsBuilder)
class LpPatchQwen3VLForConditionalGeneration(GridModel, Qwen3VLForConditionalGeneration):
    """Qwen3-VL: merged patches, beside which stand the features that DeepStack adds in the first layers."""

    def read(self, features: Tensor) -> Tensor:
        """Those that enter the language model."""
        return features[:, : self.visual_dim]
