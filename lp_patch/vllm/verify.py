"""What a server decides and refuses when it starts, before a model is loaded."""

from typing import Any

from ..errors import ConfigError
from .internals import MULTIMODAL_REGISTRY, ModelConfig, VerifyAndUpdateConfig, VllmConfig
from .options import ROWS_KEY, options_of

ROWS = 1 << 20  # positions of the largest rotary table that is made: 256 MiB at 128 dimensions in bfloat16


class Verified(VerifyAndUpdateConfig):
    """vLLM's hook for architectures that have something to say about its config."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Have position ids of several axes for each request: only these can differ from 0, 1, 2, ..."""
        options_of(model_config.hf_config)
        if not model_config.uses_mrope:
            # vLLM looks for this in the whole config too; the language model is built from its text config, without
            model_config.hf_config.mrope_section = [1, 1, 1]

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what cannot be pruned right, and plan the encoder's batches by what it encodes.

        Raises:
            ConfigError: an option of the server has no meaning with pruning, or positions may pass the rotary table.
        """
        refuse(vllm_config)
        model_config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        hf_config = model_config.hf_config
        present = MULTIMODAL_REGISTRY.create_processor(model_config).info.get_max_image_tokens()
        kept = options_of(hf_config).budget(present).stage1
        scheduler.max_num_encoder_input_tokens = max(kept, scheduler.max_num_batched_tokens * kept // present)
        pictures = model_config.multimodal_config.get_limit_per_prompt("image")
        pictures = min(pictures, model_config.max_model_len // kept)
        setattr(hf_config, ROWS_KEY, rows_needed(hf_config, model_config.max_model_len, pictures, present - kept))


def refuse(vllm_config: VllmConfig) -> None:
    """Refuse options of the server that go past pruning."""
    parallel, lora, model = vllm_config.parallel_config, vllm_config.lora_config, vllm_config.model_config
    reasons = {
        "pipeline parallel: only its first stage knows where the tokens that are left stood": (
            parallel.pipeline_parallel_size > 1
        ),
        "dual batch overlap: it parts a batch whose positions are kept as a whole": parallel.use_ubatching,
        "speculative decoding: the draft model does not get the pruned prompt's positions": (
            vllm_config.speculative_config is not None
        ),
        "LoRA on the vision tower (enable_tower_connector_lora): its tokens are counted before pruning": (
            lora is not None and lora.enable_tower_connector_lora
        ),
        "embeddings of pictures as input (enable_mm_embeds): they would not be pruned": (
            model.multimodal_config.enable_mm_embeds
        ),
        "embeddings of prompts as input (enable_prompt_embeds)": model.enable_prompt_embeds,
        "an encoder in CUDA graphs (cudagraph_mm_encoder): it goes past pruning": (
            vllm_config.compilation_config.cudagraph_mm_encoder
        ),
        "vLLM's own pruning of videos (video_pruning_rate)": model.multimodal_config.is_multimodal_pruning_enabled(),
    }
    found = [reason for reason, is_asked in reasons.items() if is_asked]
    if found:
        raise ConfigError(f"a server that prunes with lp_patch cannot have {'; nor '.join(found)}")


def rows_needed(hf_config: Any, length: int, pictures: int, gone: int) -> int:
    """How many positions the rotary table must hold, for prompts of `length` tokens that keep original positions.

    Args:
        hf_config: the model's.
        length: the longest pruned prompt with its answer.
        pictures: the most that it can hold.
        gone: the most tokens that are removed of one.

    Raises:
        ConfigError: that is more than the table of a scaled RoPE has, or than a table should have.
    """
    text = hf_config.get_text_config()
    if options_of(hf_config).config.positions == "compact":
        return length
    rows, held = length + pictures * gone, text.max_position_embeddings
    rope = getattr(text, "rope_parameters", None) or {}
    scaled = rope.get("rope_type", "default") not in ("default", "mrope")
    if rows > (held if scaled else max(held, ROWS)):
        what = f"its scaled RoPE ({rope.get('rope_type')!r}) has {held}" if scaled else f"a table may have {ROWS}"
        raise ConfigError(
            f"{pictures} pictures in one prompt of {length} tokens that keep their original positions need {rows} "
            f'positions, and {what}: lower limit_mm_per_prompt={{"image": ...}} or max_model_len, or pass '
            'positions="compact" where the model takes it'
        )
    return rows
