"""PaliGemma: pictures first, and the whole prompt sees itself in both directions.

Not over Gemma 2, which runs eagerly alone.
"""

from transformers import PaliGemmaConfig, SiglipVisionConfig

from .common import HIDDEN, IMAGE, VOCAB, Picture, Tiny, pixels, placeholders, text_config

SIDE, PATCH = 4, 4


def config():
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=PATCH,
        image_size=SIDE * PATCH,
    )  # fmt: skip
    return PaliGemmaConfig(
        vision_config=vision, text_config=text_config("gemma", head_dim=8), image_token_index=IMAGE,
        projection_dim=HIDDEN, hidden_size=HIDDEN, vocab_size=VOCAB,
    )  # fmt: skip


def picture(generator):
    return Picture(*placeholders(SIDE**2), {"pixel_values": pixels(generator, 1, 3, SIDE * PATCH, SIDE * PATCH)})


# the prompt is of type 0, what is generated of type 1
TYPES = {
    "paligemma": Tiny(
        config, picture, rows=(((), 18), ((), (), 12), (20,)), typed="token_type_ids", types={}, said=1,
        projector="multi_modal_projector",
    )
}  # fmt: skip
