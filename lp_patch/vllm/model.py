"""A vLLM model that encodes its pictures, keeps a few of their tokens, and lets these stand where they stood."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..choose import stage1_apart
from ..errors import ConfigError
from ..registry import features_width
from ..strategies import Reading
from .internals import VllmConfig
from .options import ROWS_KEY, options_of
from .positions import Span, from_digits, prompt_positions, to_digits


class PrunedModel:
    """Goes before a family's model class.

    A picture's features leave here with a few more columns: the digits of what each token that is left adds to its
    picture's position. vLLM carries them along, also through its cache of encoded pictures and through chunks of a
    prompt. When they come back with the prompt's tokens, they are taken off and added to the position ids.
    """

    axes = 1  # position ids that differ within a picture

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        hf_config = vllm_config.model_config.hf_config
        device = next(self.parameters()).device  # type: ignore[attr-defined]
        self.pruning = options_of(hf_config, features_width(hf_config))
        longest = max(
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.compilation_config.max_cudagraph_capture_size or 0,
        )
        self.offsets = torch.zeros(3, longest, dtype=torch.long, device=device)
        self.has_offsets = False
        widen(self.language_model, getattr(hf_config, ROWS_KEY))  # type: ignore[attr-defined]

    # -- what a family says

    def encode(self, **kwargs: Any) -> tuple[Sequence[Tensor], dict[Reading, Sequence[Tensor]]]:
        """Features (N, C) of each picture, and attention (N,) of each for what the scorer reads."""
        return super().embed_multimodal(**kwargs), {}  # type: ignore[misc]

    def read(self, features: Tensor) -> Tensor:
        """What stage 1 reads of a picture's features (N, C)."""
        return features

    def project(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is left of each picture (R1, C), as it enters the language model, (R1, D)."""
        return features

    def placed(self, index: Tensor, picture: int, **kwargs: Any) -> Tensor:
        """(R1, axes): what the tokens `index` (R1,) of a picture add to its position."""
        return index[:, None]

    def advance(self, data: Any) -> int:
        """How far positions go on from a picture's first token to what follows it, from vLLM's item."""
        raise NotImplementedError

    # -- what vLLM calls

    @torch.no_grad()
    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """What is left of each picture, with the digits of its places: (R1, D + 2 axes) each."""
        features, attention = self.encode(**kwargs)
        found = stage1_apart(self.pruning, self.pruning.scorer, [self.read(x) for x in features], attention)
        compact = self.pruning.config.positions == "compact"
        left, places = [], []
        for picture, (x, (kept, *_)) in enumerate(zip(features, found, strict=True)):
            index = torch.arange(len(x), device=x.device) if kept is None else kept
            left.append(x if kept is None else x.index_select(0, kept))
            if compact:
                index = torch.arange(len(index), device=x.device)
            places.append(self.placed(index, picture, **kwargs))
        return [
            torch.cat([x, to_digits(place, x.dtype)], dim=1)
            for x, place in zip(self.project(left), places, strict=True)
        ]

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Take the digits off the pictures' features and remember what they say for the forward that follows."""
        if self.has_offsets:
            self.offsets.zero_()
            self.has_offsets = False
        if multimodal_embeddings is None or len(multimodal_embeddings) == 0:
            return super().embed_input_ids(  # type: ignore[misc]
                input_ids, multimodal_embeddings, is_multimodal=is_multimodal
            )
        assert is_multimodal is not None
        columns = 2 * self.axes
        numbers = from_digits(torch.cat([x[:, -columns:] for x in multimodal_embeddings])).T
        where = is_multimodal.nonzero()[:, 0].to(self.offsets.device, non_blocking=True)
        self.offsets[3 - self.axes :].index_copy_(1, where, numbers.to(self.offsets.device))
        self.has_offsets = True
        bare = [x[:, :-columns] for x in multimodal_embeddings]
        return super().embed_input_ids(input_ids, bare, is_multimodal=is_multimodal)  # type: ignore[misc]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """(3, S): pictures stand at their start; `forward` adds what their features say."""
        spans = []
        for feature in sorted(mm_features, key=lambda x: x.mm_position.offset):
            where = feature.mm_position
            marks = torch.ones(where.length, dtype=torch.bool) if where.is_embed is None else where.is_embed
            places = marks.nonzero()[:, 0].tolist()
            kept = len(places)
            if places != list(range(places[0], places[0] + kept)):
                raise ConfigError(f"the tokens of a picture must stand together in the prompt, got {places}")
            is_compact = self.pruning.config.positions == "compact"
            spans.append(Span(where.offset + places[0], kept, kept if is_compact else self.advance(feature.data)))
        positions, delta = prompt_positions(len(input_tokens), spans)
        return positions.expand(3, -1).clone(), delta

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock forward at the positions (3, S) where the tokens stood."""
        positions = positions + self.offsets[:, : positions.shape[1]]
        if self.axes == 1:
            positions = positions[2]
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]


def widen(language_model: nn.Module, rows: int) -> None:
    """Let the rotary tables of a language model hold `rows` positions: past their end, vLLM reads without an error."""
    tables: dict[int, Any] = {id(x): x for x in language_model.modules() if hasattr(x, "cos_sin_cache")}
    if not tables:
        raise ConfigError("no rotary table was found in this language model: its positions cannot be checked")
    for rotary in tables.values():
        cache = rotary.cos_sin_cache
        if cache.shape[0] >= rows:
            continue
        before, rotary.max_position_embeddings = rotary.max_position_embeddings, rows
        wide = rotary._compute_cos_sin_cache().to(cache.device, cache.dtype)
        rotary.max_position_embeddings = before
        if wide.shape[0] < rows or not torch.equal(wide[: cache.shape[0]], cache):
            raise ConfigError(
                f"the rotary table of {type(rotary).__name__} holds {cache.shape[0]} positions and cannot be made to "
                f'hold {rows}: lower limit_mm_per_prompt={{"image": ...}} or max_model_len'
            )
        rotary.cos_sin_cache = wide
