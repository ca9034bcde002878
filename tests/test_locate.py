"""Where tokens lie in the user's picture, through the real processors: a square painted there changes that token."""

import inspect

import families
import numpy as np
import pytest
import test_processors
import torch
from PIL import Image
from test_processors import CASES, found, model_of, torchvision  # noqa: F401

from lp_patch.errors import UnsupportedInputError
from lp_patch.locate import locate, shapes_of
from lp_patch.registry import find_parts

SQUARE, SQUARES = 5, 10  # pixels to a side; how many are painted
NOWHERE = {"aria", "idefics2", "idefics2:whole", "deepseek_ocr2"}
BLURRED = {"fast_vlm", "got_ocr2", "emu3"}  # tests/test_layout.py has these
PIXTRAL = ("PixtralImageProcessorPil", {"patch_size": {"height": 4, "width": 4}, "size": {"longest_edge": 64}})
SIDE_16 = {
    "size": {"shortest_edge": 16}, "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]],
}  # fmt: skip
TILES_24 = {"size": {"longest_edge": 72}, "max_image_size": {"longest_edge": 24}}
QWEN = test_processors.QWEN["images"]
# families whose tiny models are in tests/families.py: their image processors
CLASSIC = {
    "llava": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}}),
    "llava_next": ("LlavaNextImageProcessorPil", {**SIDE_16, "crop_size": {"height": 16, "width": 16}}),
    "llava_next_video": ("LlavaNextImageProcessorPil", {**SIDE_16, "crop_size": {"height": 16, "width": 16}}),
    "llava_onevision": ("LlavaOnevisionImageProcessorPil", {**SIDE_16, "size": {"height": 16, "width": 16}}),
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "internvl": ("GotOcr2ImageProcessorPil", {**test_processors.TILES}),
    "idefics3": ("Idefics3ImageProcessorPil", TILES_24),
    "smolvlm": ("SmolVLMImageProcessorPil", TILES_24),
    "mistral3": PIXTRAL,
}


def parts_of(kind):
    """A family's parts, and its image processor with the options of its call."""
    if kind in CLASSIC:
        name, options = CLASSIC[kind]
        return find_parts(families.make(kind, dtype=torch.float32, which=(0,))[0]), found(name)(**options), {}
    case, kind = CASES[kind], kind.removesuffix(":whole")
    name, options = case.images
    call = {k: x for k, x in case.call.items() if k not in ("num_image_tokens", "max_image_size", "split_image")}
    return find_parts(model_of(kind, case)), found(name)(**options), call


def pictures_of(sizes, seed=0):
    """Grey noise, in the lists that a processor is given for two prompts."""
    random = np.random.default_rng(seed)
    drawn = [random.integers(100, 156, (height, width, 3), dtype=np.uint8) for width, height in sizes]
    return [Image.fromarray(x) for x in drawn]


def nested(pictures):
    return [pictures[:1], pictures[1:]]


@torch.no_grad()
def features_of(parts, inputs):
    """(N, D), the counted visual tokens of all pictures."""
    encode = getattr(parts.base, parts.modalities[0].encode)
    named = {n: x for n, x in inputs.items() if n in inspect.signature(encode).parameters}
    features = encode(**named).pooler_output
    if not isinstance(features, torch.Tensor):
        features = torch.cat([x.flatten(0, -2) for x in features])
    features = features.flatten(0, -2)
    breaks = parts.adapter.structural
    return features if breaks is None else features[~breaks(parts.base, features[None])[0]]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", [*CLASSIC, *[x for x in CASES if x not in NOWHERE | BLURRED]])
def test_square(kind, torchvision):  # noqa: F811
    """The token that a painted square changes most has a box that holds it; boxes of kept size lie in the picture."""
    parts, images, call = parts_of(kind)
    sizes = ((96, 48), (48, 48), (48, 144)) if kind in CLASSIC else CASES[kind].sizes
    pictures = pictures_of(sizes)
    given = pictures if kind in ("got_ocr2",) else nested(pictures)

    def process(pictures):
        return images(pictures, return_tensors="pt", **call)

    plain = features_of(parts, process(given))
    located = locate(parts.base, parts.adapter.layout, process, shapes_of(given, False), len(plain))
    assert set(located.picture.tolist()) - {-1} == {0, 1, 2}  # -1: padding alone
    random, hits = np.random.default_rng(1), 0
    for number in range(SQUARES):
        which = number % 3
        width, height = pictures[which].size
        # a processor may crop: paint where it looks
        own = located.box[located.picture == which]
        low, high = own[:, :2].amin(dim=0), own[:, 2:].amax(dim=0)
        at = (low + (high - low) * torch.from_numpy(random.uniform(0.08, 0.92, 2))).tolist()
        x, y, half = int(at[0] * width), int(at[1] * height), SQUARE // 2
        change = 0
        for paint in (255, 0, (255, 0, 128), (0, 255, 30)):
            painted = np.array(pictures[which])
            painted[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1] = paint
            changed = [Image.fromarray(painted) if i == which else x for i, x in enumerate(pictures)]
            change = change + (features_of(parts, process(nested(changed))) - plain).norm(dim=1)
        token = int(change.argmax())
        left, top, right, bottom = located.box[token].tolist()
        # a square over an edge is also in the next token
        near = (SQUARE / width, SQUARE / height)
        inside = left - near[0] <= at[0] <= right + near[0] and top - near[1] <= at[1] <= bottom + near[1]
        hits += inside and int(located.picture[token]) == which
    assert hits >= 8, f"{hits} of {SQUARES}"
    areas = (located.box[:, 2:] - located.box[:, :2]).prod(dim=1)[located.picture >= 0]
    assert areas.max() < 0.3


def test_other_pictures_are_refused(torchvision):  # noqa: F811
    parts, images, call = parts_of("qwen2_vl")

    def process(pictures):
        return images(pictures, return_tensors="pt", **call)

    with pytest.raises(UnsupportedInputError, match="other tokens of these pictures than the 77"):
        locate(parts.base, parts.adapter.layout, process, shapes_of(pictures_of([(48, 24)]), False), 77)
