"""Gemma 3n: two streams, windows, keys shared by the last layers; its tower is of timm: a stub stands in."""

from functools import partial

from torch import nn
from transformers import AutoModel, Gemma3nConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma3n import modeling_gemma3n

from .common import END, FIRST, IMAGE, START, VOCAB, Picture, Tiny, pixels, placeholders, text_config

SIDE, PIXELS, WIDE = 4, 8, 16  # tokens, pixels of one, width of the tower
WINDOW, FULL = "sliding_attention", "full_attention"


class Tower(nn.Module):
    """A map (B, C, H, W), as timm's towers hand over."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, WIDE, PIXELS, PIXELS)

    def forward(self, pixel_values, **kwargs):
        return BaseModelOutputWithPooling(last_hidden_state=self.convolution(pixel_values))


class Parts:
    """What the model makes its parts with, but for the tower."""

    @staticmethod
    def from_config(config):
        return Tower() if config.model_type == "gemma3n_vision" else AutoModel.from_config(config)


def config(**more):
    modeling_gemma3n.AutoModel = Parts
    text = text_config(
        "gemma3n_text", head_dim=8, sliding_window=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB,
        laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 6,
        **{"num_kv_shared_layers": 0, "layer_types": [WINDOW, FULL, WINDOW, WINDOW, FULL, FULL], **more},
    )  # fmt: skip
    audio = {
        "vocab_size": 4, "vocab_offset": VOCAB + 4, "hidden_size": 16, "input_feat_size": 32,
        "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "sscp_conv_channel_size": [8, 4],
    }  # fmt: skip
    return Gemma3nConfig(
        text_config=text, audio_config=audio, vision_soft_tokens_per_image=SIDE**2, image_token_id=IMAGE,
        vision_config={"hidden_size": WIDE, "vocab_size": 4, "vocab_offset": VOCAB}, audio_token_id=FIRST - 1,
        boi_token_id=START, eoi_token_id=END,
    )  # fmt: skip


def picture(generator):
    shown = pixels(generator, 1, 3, SIDE * PIXELS, SIDE * PIXELS)
    return Picture(*placeholders(SIDE**2, [START], [END]), {"pixel_values": shown})


SHARED = {"num_kv_shared_layers": 2, "layer_types": [WINDOW, FULL, WINDOW, FULL, WINDOW, FULL]}
tiny = partial(Tiny, picture=picture, rows=((6, (), 14), (4, (), 3, (), 9), (20,)))
TYPES = {"gemma3n": tiny(config), "gemma3n:shared": tiny(partial(config, **SHARED), wipes=False)}
