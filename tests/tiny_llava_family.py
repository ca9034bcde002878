"""Tiny random models of LLaVA's relatives, with pictures of several shapes and videos: nothing is downloaded."""

import inspect
from dataclasses import dataclass

import torch
from masked import merged
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
)

PAD, IMAGE, EOS, BOS, VIDEO, VOCAB = 0, 1, 2, 3, 4, 60
SIDE, PATCH = 4, 4  # patches per side of a tile, pixels per side of a patch
TILE = SIDE * PATCH
LAYERS, WIDTH = 6, 32
FRAMES = 4
GRID = [[1, 1], [1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
# height and width in pixels, tiles below the whole: wide and tall are padded, and the padding is cut off
SHAPES = {"wide": (8, 48, 3), "tall": (32, 8, 2), "square": (30, 30, 4), "small": (12, 16, 1)}

CLASSES = {
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    "llava_next_video": (LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration),
    "llava_onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
    "video_llava": (VideoLlavaConfig, VideoLlavaForConditionalGeneration),
}
WITH_VIDEO = [family for family in CLASSES if family != "llava_next"]
TILED = [family for family in CLASSES if family != "video_llava"]


def tiny(family, seed=0, dtype=torch.float64, attention="sdpa", **options):
    """A random model whose weights are large enough for attention to differ between tokens."""
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": TILE,
        "patch_size": PATCH,
    }
    text = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    onevision = family == "llava_onevision"
    if family != "video_llava":
        options["image_grid_pinpoints"] = [[TILE * h, TILE * w] for h, w in GRID]
    if family in WITH_VIDEO:
        options["video_token_index"] = VIDEO
    config, model = CLASSES[family]
    config = config(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False) if onevision else CLIPVisionConfig(**vision),
        text_config=Qwen2Config(**text) if onevision else LlamaConfig(**text),
        image_token_index=IMAGE,
        **options,
    )
    model = model(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
            elif "embed" in name or "newline" in name:
                parameter.normal_(0, 1.0)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # random models must not stop at random
    model.set_attn_implementation(attention)
    return model


def parts(model):
    """Decoder layers and language model, as the oracle takes them."""
    return model.model.language_model.layers, model.model.language_model


def pixels(count, generator, dtype):
    """(count, 3, TILE, TILE), smooth enough for neighbouring patches to resemble each other."""
    coarse = torch.randn(count, 3, 2 * SIDE, 2 * SIDE, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(TILE, TILE), mode="bilinear").to(dtype)


@dataclass
class Row:
    """One prompt.

    Attributes:
        ids: its tokens.
        visual: the positions of each image's and each video's counted tokens, in the order of the prompt.
        structural: positions of its line breaks.
        shown: pixel arguments of the model for it alone.
    """

    ids: list[int]
    visual: list[list[int]]
    structural: list[int]
    shown: dict[str, torch.Tensor]

    @property
    def counted(self):
        return sum(map(len, self.visual))

    def inputs(self, more=()):
        """Keyword arguments of a forward for this row alone; `more` tokens follow."""
        ids = torch.tensor([[*self.ids, *more]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.shown}


def row(model, *prompt, seed=0):
    """`prompt`: ints are so many random text tokens; a name of SHAPES is an image; "video" is a video."""
    generator = torch.Generator().manual_seed(seed)
    dtype, tiled = model.dtype, model.config.model_type in TILED
    ids, groups, images, sizes, videos = [], [], [], [], []
    for part in prompt:
        if isinstance(part, int):
            ids += torch.randint(5, VOCAB, (part,), generator=generator).tolist()
            continue
        if part == "video":
            videos.append(pixels(FRAMES, generator, dtype)[None])
            features, token = model.model.get_video_features(videos[-1], return_dict=True), VIDEO
        elif tiled:
            height, width, tiles = SHAPES[part]
            images.append(pixels(1 + tiles, generator, dtype))
            sizes.append((height, width))
            features = model.model.get_image_features(images[-1][None], torch.tensor(sizes[-1:]), return_dict=True)
            token = IMAGE
        else:
            images.append(pixels(1, generator, dtype))
            features, token = model.model.get_image_features(images[-1], return_dict=True), IMAGE
        count = sum(x.shape[:-1].numel() for x in features.pooler_output)
        groups.append(list(range(len(ids), len(ids) + count)))
        ids += [token] * count
    shown = {}
    if images and tiled:
        most = max(map(len, images))
        blank = [x.new_zeros(most - len(x), *x.shape[1:]) for x in images]
        shown["pixel_values"] = torch.stack([torch.cat(x) for x in zip(images, blank, strict=True)])
        shown["image_sizes"] = torch.tensor(sizes)
    elif images:
        named = set(inspect.signature(model.forward).parameters)
        shown["pixel_values" if "pixel_values" in named else "pixel_values_images"] = torch.cat(images)
    if videos:
        shown["pixel_values_videos"] = torch.cat(videos)
    return counted(model, Row(ids, groups, [], shown))


def row_of(model, inputs):
    """The same from what a processor makes of one prompt, whose pictures have text between them."""
    ids = inputs["input_ids"][0].tolist()
    groups = []
    for i, token in enumerate(ids):
        if token in (IMAGE, VIDEO):
            groups += [] if i and ids[i - 1] == token else [[]]
            groups[-1].append(i)
    shown = {name: x for name, x in inputs.items() if name not in ("input_ids", "attention_mask")}
    return counted(model, Row(ids, groups, [], shown))


def counted(model, one):
    """The row with its line breaks told from its visual tokens."""
    breaks = line_breaks(model, one.inputs())
    return Row(one.ids, [[p for p in x if p not in breaks] for x in one.visual], breaks, one.shown)


@torch.no_grad()
def line_breaks(model, inputs):
    """Positions that change with the learnt line break."""
    newline = getattr(model.model, "image_newline", None)
    if newline is None:
        return []
    before, kept = merged(model, model.model.language_model, inputs), newline.clone()
    newline.add_(1)
    after = merged(model, model.model.language_model, inputs)
    newline.copy_(kept)
    return (before != after).any(dim=-1)[0].nonzero().flatten().tolist()


def batch(rows, side="left"):
    """All rows in one call, padded on one side: the keyword arguments of a forward."""
    length = max(len(x.ids) for x in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, x in enumerate(rows):
        where = slice(length - len(x.ids), length) if side == "left" else slice(0, len(x.ids))
        ids[i, where] = torch.tensor(x.ids)
        mask[i, where] = 1
    return {"input_ids": ids, "attention_mask": mask, **together(rows)}


def joined(rows):
    """One prompt of several, one after the other."""
    starts = [sum(len(x.ids) for x in rows[:i]) for i in range(len(rows))]
    return Row(
        [i for x in rows for i in x.ids],
        [[start + p for p in own] for start, x in zip(starts, rows, strict=True) for own in x.visual],
        [start + p for start, x in zip(starts, rows, strict=True) for p in x.structural],
        together(rows),
    )


def together(rows):
    """The pixel arguments of all rows."""
    shown = {}
    for name in ("pixel_values", "pixel_values_images", "image_sizes", "pixel_values_videos"):
        own = [x.shown[name] for x in rows if name in x.shown]
        if own and own[0].dim() == 5:  # the number of tiles differs, and the model ignores what is too many
            most = max(x.shape[1] for x in own)
            own = [torch.cat([x, x.new_zeros(len(x), most - x.shape[1], *x.shape[2:])], 1) for x in own]
        if own:
            shown[name] = torch.cat(own)
    return shown


WORDS = ["<pad>", "<image>", "</s>", "<s>", "<video>", "<unk>", "what", "is", "this", "compare", "to", "and", "?"]


def processor(family):
    """The family's real processor, built offline. Without torchvision, `frames` stands in for its video processor."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<video>"],
        padding_side="left",
    )
    grid = [[TILE * h, TILE * w] for h, w in GRID]
    square, shortest = {"height": TILE, "width": TILE}, {"shortest_edge": TILE}
    clip = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    siglip = {"num_image_tokens": SIDE * SIDE, "vision_feature_select_strategy": "full"}
    tiles = LlavaNextImageProcessorPil(size=shortest, crop_size=square, image_grid_pinpoints=grid)
    kind, images, options = {
        "llava_next": (LlavaNextProcessor, tiles, clip),
        "llava_next_video": (LlavaNextVideoProcessor, tiles, clip),
        "llava_onevision": (
            LlavaOnevisionProcessor, LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=grid), siglip
        ),
        "video_llava": (VideoLlavaProcessor, VideoLlavaImageProcessor(size=shortest, crop_size=square), clip),
    }[family]  # fmt: skip

    class Offline(kind):
        def check_argument_for_proper_class(self, name, argument):
            return type(argument)  # our stand-in is no video processor

    return Offline(image_processor=images, tokenizer=tokenizer, video_processor=frames, **options)


def frames(videos, **_):
    """Arrays (FRAMES, TILE, TILE, 3) of bytes to what video processors hand out."""
    stacked = torch.stack([torch.as_tensor(video) for video in videos])
    return {"pixel_values_videos": stacked.movedim(-1, 2) / 127.5 - 1}
