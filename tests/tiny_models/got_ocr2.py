"""GOT-OCR 2 with tiles of a page, and PP-Chart2Table, which has one picture of one size."""

from transformers import GotOcr2Config, PPChart2TableConfig

from .common import END, IMAGE, START, Picture, Tiny, pixels, placeholders, text_config

SIDE, PATCH = 16, 2  # patches of a tile, and pixels of one
N = (SIDE // 4) ** 2  # tokens of a tile: the projector halves each side twice


def made(kind):
    vision = {
        "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE * PATCH, "patch_size": PATCH, "window_size": 5, "global_attn_indexes": [1], "mlp_dim": 24,
        "initializer_range": 0.02,
    }  # fmt: skip
    return kind(vision_config=vision, text_config=text_config("qwen2"), image_token_index=IMAGE)


def config():
    return made(GotOcr2Config)


def chart_config():
    return made(PPChart2TableConfig)


def picture(generator, tiles=1):
    shown = pixels(generator, tiles, 3, SIDE * PATCH, SIDE * PATCH)
    return Picture(*placeholders(tiles * N, [START], [END]), {"pixel_values": shown})


def adjust(model):
    # the whole model's config says "eager" whatever its text layers run, and the oracle puts back what it says
    model.config._attn_implementation = model.get_decoder().config._attn_implementation


TYPES = {
    "got_ocr2": Tiny(config, picture, rows=((3, (), 5), (2, (3,), 1, (), 3), (6,)), adjust=adjust),
    "pp_chart2table": Tiny(chart_config, picture, adjust=adjust),
}
