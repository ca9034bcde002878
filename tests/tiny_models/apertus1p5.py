"""Apertus 1.5: pictures of any size as codes of a VQ encoder, which lie behind the ids that are said."""

import torch
from transformers import Apertus1p5Config

from .common import END, FIRST, IMAGE, START, VOCAB, Picture, Tiny, pixels, text, text_config

LINE, AUDIO, CODES, SOUNDS, FACTOR, SIDE = 6, 7, 64, 8, 2, 10


def config():
    vision = {
        "codebook_size": CODES, "embed_dim": 8, "latent_channels": 8, "base_channels": 32,
        "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "resolution": 16,
    }  # fmt: skip
    audio = {
        "model_type": "wavtokenizer_encoder", "num_filters": 4, "hidden_size": 8, "codebook_dim": 8,
        "codebook_size": SOUNDS, "num_lstm_layers": 1,
    }  # fmt: skip
    return Apertus1p5Config(
        vision_config=vision, audio_config=audio,
        text_config=text_config("apertus1p5_text", vocab_size=VOCAB + CODES + SOUNDS, max_position_embeddings=16384),
        image_token_id=IMAGE, audio_token_id=AUDIO, image_token_offset=VOCAB, audio_token_offset=VOCAB + CODES,
    )  # fmt: skip


def picture(generator, height, width):
    """`height` x `width` codes behind the picture's size; line breaks between rows are text to the model."""
    ids, visual = [START, *text(generator, 3)], []
    for row in range(height):
        ids += [LINE] * (row > 0)
        visual += range(len(ids), len(ids) + width)
        ids += [IMAGE] * width
    values = torch.zeros(1, 3, SIDE, SIDE)  # all are padded to one size; the encoder cuts that off
    values[:, :, : FACTOR * height, : FACTOR * width] = pixels(generator, 1, 3, FACTOR * height, FACTOR * width)
    inputs = {"pixel_values": values, "image_sizes": torch.tensor([[FACTOR * height, FACTOR * width]])}
    return Picture([*ids, END], visual, inputs)


def any_attention(model):
    """The tokenizers have no attention to choose, and refuse the choice that the tests make for the whole model."""
    model.model.vision_tokenizer._supports_sdpa = model.model.audio_tokenizer._supports_sdpa = True
    return model


def say_no_codes(model):
    """Neither a picture nor a sound is an answer here."""
    model.generation_config.suppress_tokens = [*range(FIRST), *range(VOCAB, VOCAB + CODES + SOUNDS)]


TYPES = {
    "apertus1p5": Tiny(
        config,
        picture,
        rows=((3, (4, 4), 5), (2, (3, 5), (2, 4), 3), (6,)),
        patch=any_attention,
        adjust=say_no_codes,
    )
}
