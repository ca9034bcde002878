"""Janus: its own ViT, and a VQ-VAE by which it draws."""

from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig

from .common import END, HIDDEN, IMAGE, START, Picture, Tiny, pixels, placeholders, text_config

SIDE, PATCH = 4, 7  # patches, and pixels of one


def config():
    vision = JanusVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE * PATCH, patch_size=PATCH,
        mlp_ratio=2, projection_dim=HIDDEN, num_image_tokens=SIDE * SIDE,
    )  # fmt: skip
    drawing = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=50, latent_channels=32, base_channels=32, channel_multiplier=[1, 1],
        num_res_blocks=1, projection_dim=HIDDEN, image_token_embed_dim=HIDDEN,
    )  # fmt: skip
    return JanusConfig(vision_config=vision, vq_config=drawing, text_config=text_config("llama"), image_token_id=IMAGE)


def picture(generator):
    shown = pixels(generator, 1, 3, SIDE * PATCH, SIDE * PATCH)
    return Picture(*placeholders(SIDE * SIDE, [START], [END]), {"pixel_values": shown})


TYPES = {"janus": Tiny(config, picture)}
