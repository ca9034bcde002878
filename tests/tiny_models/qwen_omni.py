"""The thinkers of Qwen2.5-Omni and Qwen3-Omni: images, videos, and sound, which is not pruned, behind one picture."""

import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen3OmniMoeThinkerConfig

from .common import END, HIDDEN, IMAGE, START, VIDEO, Picture, Tiny, placeholders, text_config
from .glm4v import AXES, FILMS, PATCH, count, grid, vision

SOUND, OPEN, CLOSE = 6, 7, 8
MELS, FRAMES = 8, 24  # of a clip, which becomes 6 tokens, or 3
ROWS = ((3, (3, 4, 0, True), 5), *FILMS[1:])
TOKENS = {
    "audio_start_token_id": OPEN, "audio_end_token_id": CLOSE, "vision_start_token_id": START,
    "vision_end_token_id": END,
}  # fmt: skip
AUDIO = {
    "num_mel_bins": MELS, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "d_model": 16,
    "max_source_positions": 64, "output_dim": HIDDEN,
}  # fmt: skip


def qwen2_5():
    return Qwen2_5OmniThinkerConfig(
        vision_config=vision(window_size=4 * PATCH, fullatt_block_indexes=[1]), audio_config={**AUDIO, "n_window": 4},
        text_config=text_config("qwen2_5_omni_text", rope_parameters=AXES),
        image_token_index=IMAGE, video_token_index=VIDEO, audio_token_index=SOUND, **TOKENS,
    )  # fmt: skip


def qwen3():
    text = text_config(
        "qwen3_omni_moe_text", head_dim=8, rope_parameters=AXES, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24,
    )  # fmt: skip
    return Qwen3OmniMoeThinkerConfig(
        vision_config=vision(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
        audio_config={**AUDIO, "downsample_hidden_size": 4}, text_config=text,
        image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=SOUND, **TOKENS,
    )  # fmt: skip


def picture_of(sounds):
    def picture(generator, height, width, frames=0, spoken=False):
        given = grid(generator, height, width, frames)
        tokens = height * width * max(1, frames)
        ids, visual = placeholders(tokens, [START], [END], VIDEO if frames else IMAGE)
        if frames:
            given["video_second_per_grid"] = torch.ones(1)
        if spoken:
            ids += [OPEN, *[SOUND] * sounds, CLOSE]
            given["input_features"] = torch.randn(1, MELS, FRAMES, generator=generator)
            given["feature_attention_mask"] = torch.ones(1, FRAMES, dtype=torch.long)
        return Picture(ids, visual, given)

    return picture


def tiny(config, sounds):
    return Tiny(config, picture_of(sounds), rows=ROWS, positions=False, adjust=count)


TYPES = {"qwen2_5_omni_thinker": tiny(qwen2_5, 6), "qwen3_omni_moe_thinker": tiny(qwen3, 3)}
