"""The real processors of the types of `tests/tiny_models`: what they write for pictures is what the adapters read.

Image processors for torchvision run on a stand-in for the three functions of it that they need.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from test_other_families import picture, tokenizer
from tiny_models import TYPES
from tiny_models.common import build
from torch.nn.functional import interpolate, pad
from transformers import image_processing_backends

import lp_patch

STAGE1, STAGE2, NEW = 4, 2, 3  # tokens that a visual input keeps after each stage; generated ones
WIDE, SQUARE, HIGH = (48, 24), (24, 24), (24, 72)  # pixels, width and height
VOCAB = 300  # the tokenizer's, bytes after the special tokens


@dataclass
class Case:
    """A type's processor, small.

    Attributes:
        processor: its class.
        images: the image processor's class and its options.
        tokens: special tokens, whose ids are 2, 3, ... as the tiny config has them; one that the processor asks the
            tokenizer for has its name before an equals sign, and "-" is none.
        place: what a prompt has for a picture.
        counts: of three pictures the tokens of each of their visual inputs, as the pictures' sizes want them.
        sizes: of the three pictures, one of the first row, two of the second.
        options: the processor's.
        call: more arguments of its call.
        between: text between the two pictures of the second row.
        flat: whether it is given pictures in one list.
        config: changes the tiny config.
        adjust: in place of the tiny model's.
    """

    processor: str
    images: tuple[str, dict]
    tokens: str
    place: str
    counts: tuple
    sizes: tuple = (WIDE, SQUARE, HIGH)
    options: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)
    between: str = ""
    flat: bool = False
    config: Callable[[Any], None] = lambda config: None
    adjust: Callable[[Any], None] | None = None


@pytest.fixture
def torchvision(monkeypatch):
    """What image processors need of it, on torch; a picture is resized by its nearest pixels."""
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    functional = ModuleType("functional")
    functional.InterpolationMode = SimpleNamespace(BILINEAR="", LANCZOS="")
    functional.normalize = lambda image, mean, std, inplace: (image - mean[:, None, None]) / std[:, None, None]
    functional.pad = lambda image, sides, fill, padding_mode: pad(image, (sides[0], sides[2], sides[1], sides[3]))
    functional.resize = lambda image, size, **how: (
        interpolate(image.float().flatten(0, -3)[None], size=size)[0].view(*image.shape[:-2], *size).to(image.dtype)
    )
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].functional = functional
    monkeypatch.setattr(image_processing_backends, "tvF", functional, raising=False)
    monkeypatch.setattr(image_processing_backends, "pil_torch_interpolation_mapping", dict.fromkeys(range(6)))


def found(name):
    """A class of transformers, which itself hands out a stand-in for it without torchvision."""
    return getattr(import_module(getattr(transformers, name).__module__), name)


def processor_of(case):
    """The real one, but for a stand-in in place of its video processor."""

    class Real(found(case.processor)):
        model_input_names = ()

        def check_argument_for_proper_class(self, name, argument):
            return type(argument)

    named, special = {}, ["<pad>", "<eos>"]
    for given in case.tokens.split():
        name, token = given.split("=") if "=" in given else (None, given)
        special.append(f"<unused{len(special)}>" if token == "-" else token)
        if name:
            named[f"{name}_token"] = token
    words = tokenizer(special, named)
    words.bos_token = "<eos>"
    kind, options = case.images
    parts = {"image_processor": found(kind)(**options), "tokenizer": words}
    parts["image_processor"].image_seq_length = case.counts[0][0]  # PaliGemma asks
    for name in {"video_processor", "feature_extractor"} & set(Real.get_attributes()):
        parts[name] = SimpleNamespace(slice_mode=True, downsample_mode="16x")
    return Real(**parts, **case.options)


def model_of(kind, case):
    """The type's tiny model with the tokenizer's vocabulary."""
    tiny = TYPES[kind]

    def config():
        made = tiny.config()
        made.get_text_config().vocab_size = VOCAB
        case.config(made)
        return made

    return build(replace(tiny, config=config, adjust=case.adjust or tiny.adjust), dtype=torch.float32)


def square(side):
    return {"height": side, "width": side}


def far(config):
    """Gemma 4's pictures have no fewer tokens than so many."""
    config.vision_config.position_embedding_size = 64


def coarse(config):
    """Aria's pictures have no fewer pixels than so many."""
    config.vision_config.image_size, config.vision_config.patch_size = 490, 70
    config.projector_patch_to_query_dict = {49: 12}


def deep(config):
    """Emu3's processor knows codes of 8 x 8 pixels alone."""
    config.vq_config.channel_multiplier = [1, 1, 1, 1]


GRID = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 4096}}
PAGES = {"patch_size": square(8), "size": {"longest_edge": 64}}
TILES = {"size": square(24), "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
GOT = ("GotOcr2ImageProcessorPil", TILES)
SIXTEEN = {"num_image_tokens": 16}
ONE = {"counts": ([16], [16], [16])}
MERGED = {"counts": ([18], [9], [27])}  # 2 x 2 patches of 4 x 4 pixels
TILED = {"counts": ([27], [9], [36])}  # 9 a tile or thumbnail
QWEN = {
    "images": ("Qwen2VLImageProcessorPil", {**GRID, "temporal_patch_size": 2}), **MERGED,
    "tokens": "<|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|>",
    "place": "<|vision_start|><|image_pad|><|vision_end|>",
}  # fmt: skip
GLM = {
    "tokens": "<|image|> <|video|> <|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|>",
    "place": "<|begin_of_image|><|image|><|end_of_image|>", **MERGED,
}  # fmt: skip
PADDLE = {
    "tokens": "image=<|IMAGE|> video=<|VIDEO|> image_start=<|IS|> image_end=<|IE|> video_start=<|VS|> video_end=<|VE|>",
    "place": "<|IS|><|IMAGE|><|IE|>", **MERGED,
}  # fmt: skip
MINICPM = {
    "tokens": "image=<|image_pad|> video=<|video_pad|> image_start=<image> image_end=</image> slice_start=<slice> "
    "slice_end=</slice> image_id_start=<image_id> image_id_end=</image_id>",
    "place": "<|image_pad|>", "sizes": ((80, 40), (40, 40), (30, 90)), "counts": ([26], [9], [37]),
}  # fmt: skip
SLICES = {"patch_size": 4, "scale_resolution": 48, "max_slice_nums": 4}
IDEFICS2 = {"tokens": "image=<image> - image_boundary=<fake>", "place": "<image>", "options": {"image_seq_len": 9}}
GEMMA = {
    "images": ("Gemma3ImageProcessorPil", {
        "size": square(32), "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }),
    "tokens": "image=<image_soft_token> - boi=<start_of_image> eoi=<end_of_image>", "place": "<start_of_image>",
    "counts": ([16] * 3, [16], [16] * 4), "options": {"image_seq_length": 16},
    "call": {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16},
}  # fmt: skip
LLAVA = {"tokens": "image=<image>", "place": "<image>", **ONE}
CELLS = " ".join(f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5))
CASES = {
    "aria": Case(
        "AriaProcessor", ("AriaImageProcessorPil", {"split_image": True, "max_image_size": 490}),
        "image=<|img|> - <fim_prefix> <fim_suffix>", "<fim_prefix><|img|><fim_suffix>",
        sizes=((48, 24), (24, 48), (60, 30)), counts=([24], [24], [24]),  # crops of all as many as of the most split
        options={"size_conversion": {490: 12}}, call={"max_image_size": 490, "split_image": True}, config=coarse,
    ),
    "aya_vision": Case(
        "AyaVisionProcessor", GOT, "<|IMG_PATCH|> <image> <|START_OF_IMG|> <|END_OF_IMG|> TILE TILE_GLOBAL", "<image>",
        **TILED, options={"patch_size": 4, "img_size": 24, "downsample_factor": 2},
    ),
    "cohere2_vision": Case(
        "Cohere2VisionProcessor", ("Cohere2VisionImageProcessor", {**TILES, "patch_size": 3}),
        "image=<image> - boi=<start> eoi=<end> img_line_break=<line>", "<image>", **TILED,
    ),
    "deepseek_vl": Case(
        "DeepseekVLProcessor", ("DeepseekVLImageProcessorPil", {"size": square(28)}), **LLAVA, options=SIXTEEN,
    ),
    "deepseek_vl_hybrid": Case(
        "DeepseekVLHybridProcessor",
        ("DeepseekVLHybridImageProcessorPil", {"size": square(28), "high_res_size": square(64)}), **LLAVA,
        options=SIXTEEN,
    ),
    "deepseek_ocr2": Case(
        "DeepseekOcr2Processor",
        ("DeepseekOcr2ImageProcessorPil", {"size": square(48), "tile_size": 48, "max_patches": 4}), "image=<image>",
        "<image>", **TILED, sizes=((96, 48), (48, 48), (48, 144)), options={"patch_size": 4, "downsample_ratio": 4},
    ),
    "emu3": Case(
        "Emu3Processor", ("Emu3ImageProcessor", {"min_pixels": 64, "max_pixels": 4096, "spatial_factor": 8}),
        "image=<image> - boi=<boi> eoi=<eoi> <line> image_wrapper=<img> eof=<eof>", "<image>", **MERGED, config=deep,
    ),
    "ernie4_5_vl_moe": Case(
        "Ernie4_5_VLMoeProcessor", ("Ernie4_5_VLMoeImageProcessorPil", GRID), **PADDLE, adjust=lambda model: None,
    ),
    "exaone4_5": Case("Exaone4_5_Processor", **QWEN),
    "fast_vlm": Case(
        "LlavaProcessor", ("CLIPImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": square(32)}), **LLAVA,
        options={"patch_size": 8, "vision_feature_select_strategy": "full"},
    ),
    "gemma3": Case("Gemma3Processor", **GEMMA),
    "gemma4": Case(
        "Gemma4Processor",
        ("Gemma4ImageProcessorPil", {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}),
        "image=<|image|> <|video|> boi=<|image> eoi=<image|> audio=<|audio|> boa=<|audio> eoa=<audio|>", "<|image|>",
        ([55], [64], [56]), config=far,
    ),
    "glm4v": Case("Glm4vProcessor", ("Glm4vImageProcessorPil", GRID), **GLM),
    "glm4v_moe": Case("Glm4vProcessor", ("Glm4vImageProcessorPil", GRID), **GLM),
    "glm46v": Case("Glm46VProcessor", ("Glm46VImageProcessorPil", GRID), **GLM),
    "glm_ocr": Case("Glm46VProcessor", ("Glm46VImageProcessorPil", GRID), **GLM),
    "glmga": Case("Glm46VProcessor", ("GlmgaImageProcessorPil", GRID), **GLM),
    "got_ocr2": Case(
        "GotOcr2Processor", (GOT[0], {**TILES, "size": square(32)}), "<imgpad> - <img> </img>", "<img><imgpad></img>",
        ([48], [16], [64]), call={"num_image_tokens": 16, "crop_to_patches": True, "max_patches": 4}, flat=True,
    ),
    "granite_docling": Case(
        "GraniteDoclingProcessor", ("GraniteDoclingImageProcessorPil", TILES), f"<image> <global-img> <fake> {CELLS}",
        "<image>", **TILED, options={"image_seq_len": 9},
    ),
    "hunyuan_vl": Case(
        "HunYuanVLProcessor", ("HunYuanVLImageProcessorPil", GRID),
        "image=<image> - image_start=<start> image_end=<end>", "<start><image><end>", **MERGED,
    ),
    "hy_v4_vl": Case("HYV4VLProcessor", **{**QWEN, "images": ("HYV4VLImageProcessorPil", GRID)}),
    "idefics2": Case(
        "Idefics2Processor", ("Idefics2ImageProcessorPil", {
            "size": {"shortest_edge": 12, "longest_edge": 16}, "do_image_splitting": True,
        }), **IDEFICS2, counts=([45], [45], [45]),
    ),
    "idefics2:whole": Case(
        "Idefics2Processor", ("Idefics2ImageProcessorPil", {"size": {"shortest_edge": 12, "longest_edge": 16}}),
        **IDEFICS2, counts=([9], [9], [9]),
    ),
    "janus": Case(
        "JanusProcessor", ("JanusImageProcessorPil", {"size": square(28)}), "image=<image> - boi=<boi> eoi=<eoi>",
        "<image>", **ONE, options=SIXTEEN,
    ),
    "kimi_k25": Case(
        "Kimi_K25Processor",
        ("Kimi_K25ImageProcessor", {"patch_size": 4, "merge_size": 2, "size": {"max_height": 96, "max_width": 96}}),
        "<|media_pad|> <|kimi_k25_video_placeholder|> <|media_begin|> <|media_end|> <|media_content|>",
        "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>", **MERGED,
    ),
    "lfm2_vl": Case(
        "Lfm2VlProcessor", ("Lfm2VlImageProcessor", {
            "tile_size": 24, "encoder_patch_size": 4, "min_image_tokens": 4, "max_image_tokens": 9, "max_tiles": 4,
            "max_pixels_tolerance": 1.0,
        }),
        "<image> - <|image_start|> <|image_end|> <|img_thumbnail|> " + CELLS.replace("<", "<|img_").replace(">", "|>"),
        "<image>", ([26], [9], [32]),
    ),
    "lighton_ocr": Case(
        "LightOnOcrProcessor", ("PixtralImageProcessorPil", PAGES),
        "image=<image> - image_break=<break> image_end=<end>", "<image>", ([18], [9], [24]), options={"patch_size": 4},
    ),
    "minicpmv4_6": Case("MiniCPMV4_6Processor", ("MiniCPMV4_6ImageProcessorPil", SLICES), **MINICPM),
    "minicpmv4_7": Case("MiniCPMV4_7Processor", ("MiniCPMV4_6ImageProcessorPil", SLICES), **MINICPM),
    "minicpm_ocr": Case(  # merges a quarter as many patches
        "MiniCPMOcrProcessor", ("MiniCPMOcrImageProcessor", {**SLICES, "scale_resolution": 24}),
        **{**MINICPM, "sizes": ((40, 20), (20, 20), (15, 45))},
    ),
    "mistral_large4": Case(
        "PixtralProcessor", ("PixtralImageProcessorPil", {**PAGES, "patch_size": square(4)}),
        "[IMG] - - [IMG_END] [IMG_BREAK]", "[IMG]", ([18], [9], [24]),
        options={"patch_size": 4, "spatial_merge_size": 2},
    ),
    "molmo2": Case(
        "Molmo2Processor",
        ("Molmo2ImageProcessor", {"size": square(16), "patch_size": 4, "overlap_margins": [1, 1], "max_crops": 4}),
        "<im_patch> <|image|> <im_start> <im_end> <|video|> <frame_start> <low_res_im_start> <im_col> <frame_end> "
        "<im_low>", "<|image|>", ([12], [13], [14]),
    ),
    "ovis2": Case(
        "Ovis2Processor", ("Ovis2ImageProcessorPil", TILES),
        "<IMG_ATOM> <image> <IMG_START> <IMG_END> <IMG_GRID> <IMG_COL> <IMG_ROW>", "<image>", **TILED,
        options={"image_seq_length": 9},
    ),
    "paddleocr_vl": Case("PaddleOCRVLProcessor", ("PaddleOCRVLImageProcessorPil", GRID), **PADDLE),
    "paligemma": Case("PaliGemmaProcessor", ("SiglipImageProcessorPil", {"size": square(16)}), **LLAVA),
    "perception_lm": Case(
        "PerceptionLMProcessor", ("PerceptionLMImageProcessor", {"tile_size": 24, "max_num_tiles": 4}),
        "image=<image> video=<video>", "<image>", sizes=((48, 24), (24, 48), (44, 22)),  # of all as many tiles
        counts=([27], [27], [27]), options={"patch_size": 4}, between=" A cat",
    ),
    "qianfan_ocr": Case(
        "QianfanOCRProcessor", GOT, "context_image=<IMG_CONTEXT> <image> start_image=<img> end_image=</img>", "<image>",
        **TILED, options={"image_seq_length": 9},
    ),
    "qwen3_5": Case("Qwen3VLProcessor", **QWEN),
    "qwen3_5_moe": Case("Qwen3VLProcessor", **QWEN),
    "shieldgemma2": Case("Gemma3Processor", **GEMMA),
    "step3p7": Case(
        "Step3p7Processor", ("Step3p7ImageProcessor", {"size": square(48), "patch_size": 32, "vision_patch_size": 4}),
        "<im_patch> - <im_start> <im_end> <patch_start> <patch_end> <patch_newline>", "<im_patch>", ([17], [9], [21]),
    ),
    "video_llama_3": Case(
        "VideoLlama3Processor",
        ("VideoLlama3ImageProcessorPil", {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 4096}}),
        "image=<image> video=<video>", "<image>", ([72], [36], [108]),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of processors, with numpy 2
@pytest.mark.parametrize("kind", CASES)
def test_processor_to_generate(kind, torchvision):
    """Two rows, of one picture and of two: every token is some picture's, and what every picture keeps."""
    case, kind = CASES[kind], kind.removesuffix(":whole")
    model, processor = model_of(kind, case), processor_of(case)
    pictures = [picture(*size, seed) for seed, size in enumerate(case.sizes)]
    ask = "What is in the picture?"
    texts = [f"{case.place}{ask}", f"{case.place}{case.between}{case.place} A cat is on the mat. {ask}"]
    images = pictures if case.flat else [pictures[:1], pictures[1:]]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt", **case.call)
    inputs.pop("labels", None)  # PaliGemma's
    rows = [case.counts[0], case.counts[1] + case.counts[2]]
    with torch.no_grad():
        plain = model(**inputs).logits
    with lp_patch.applied(model, tokens=STAGE2, stage_ratio=2, layer=TYPES[kind].layer) as patch, torch.no_grad():
        logits = model(**inputs).logits
        trace = patch.trace
        said = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert trace.visual_tokens == [sum(row) for row in rows]
    assert [left(*x) for x in zip(trace.stage1, rows, strict=True)] == [[STAGE1] * len(row) for row in rows]
    assert [len(x) for x in trace.stage2] == [STAGE2 * len(row) for row in rows]
    assert logits.shape == plain.shape and not torch.allclose(logits, plain, atol=1e-3)
    assert said.shape[1] == inputs["input_ids"].shape[1] + NEW


def left(kept, counts):
    """How many of a row's kept tokens (n,) are of each of its visual inputs, which have so many tokens."""
    return [int(x.sum()) for x in kept.bincount(minlength=sum(counts)).split(counts)]
