"""LLaVA over Mistral, whose layers all have a window."""

from transformers import CLIPVisionConfig, LlavaConfig

from .common import IMAGE, Picture, Tiny, pixels, placeholders, text_config

SIDE = 4  # patches


def config():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=14 * SIDE,
        patch_size=14, projection_dim=16,
    )  # fmt: skip
    text = text_config("mistral", sliding_window=8)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=SIDE**2)


def picture(generator):
    return Picture(*placeholders(SIDE**2), {"pixel_values": pixels(generator, 1, 3, 14 * SIDE, 14 * SIDE)})


ROWS = ((6, (), 14), (4, (), 3, (), 9), (20,))
TYPES = {"llava:window": Tiny(config, picture, rows=ROWS, projector="multi_modal_projector", static=False)}
