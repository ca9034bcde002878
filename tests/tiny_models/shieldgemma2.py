"""ShieldGemma 2: Gemma 3 under another name."""

from dataclasses import replace

from transformers import ShieldGemma2Config

from .gemma3 import TYPES as GEMMA
from .gemma3 import config as gemma_config


def config():
    given = gemma_config()
    return ShieldGemma2Config(
        vision_config=given.vision_config, text_config=given.text_config, mm_tokens_per_image=given.mm_tokens_per_image,
        image_token_index=given.image_token_index, boi_token_index=given.boi_token_index,
        eoi_token_index=given.eoi_token_index,
    )  # fmt: skip


TYPES = {"shieldgemma2": replace(GEMMA["gemma3"], config=config)}
