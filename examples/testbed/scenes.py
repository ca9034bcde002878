"""Scenes: named drawings and a coloured sign on cluttered photographic backgrounds, with exact labels.

Nothing but the named kinds is labelled.  Clutter (other drawings, clip art, photo cut-outs, coloured shapes)
lies under the objects and belongs to the background.
"""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import dataclass, field
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sources import ICONIFY, RUNS, SOURCES, IconSet
from vocabulary import CATALOGUE, COLOURS, KINDS, NAMES, SIGN

SIDE = 336
PATCH = 14
GRID = SIDE // PATCH
SPRITE = 120
TRAINING_STYLES = ("fluent-3d", "fluent-flat", "noto", "noto-v1", "fxemoji")
UNSEEN_STYLE = "twemoji"
IGNORE = 255
PLANES = ("class", "instance", "coverage", "area")
FOREGROUND = 0.22
"""Share of a patch that one object must cover to give the patch its label."""

_CLUTTER = """
grinning-face smiling-face-with-sunglasses thumbs-up waving-hand eyes red-heart fire droplet cloud star
gear wrench envelope pencil paperclip snowflake maple-leaf cherries bread sushi ice-cream cookie glasses
t-shirt running-shoe necktie laptop printer
battery magnet telescope syringe door bed soccer-ball trophy moai volcano
ferris-wheel castle sun crescent-moon globe-showing-americas hourglass-done scroll toilet shopping-cart
fork-and-knife spoon military-medal dart direct-hit game-die chess-pawn teddy-bear yarn thread gem-stone ring
lipstick handbag backpack high-heeled-shoe gloves scarf socks snowman pumpkin jack-o-lantern wrapped-gift
party-popper satellite-antenna microphone headphone radio videocassette television telephone floppy-disk
mobile-phone light-rail metro motorcycle kick-scooter construction traffic-light horizontal-traffic-light
stop-sign fuel-pump bone brain tooth footprints dove peacock lobster shrimp squid snake lizard crocodile camel
horse monkey gorilla mouse hamster chipmunk bat spider scorpion peach pear kiwi-fruit coconut grapes melon
hot-pepper broccoli garlic onion peanuts chestnut croissant pretzel pancakes cheese-wedge bacon hot-dog
sandwich taco popcorn bento-box fried-shrimp moon-cake dango candy chocolate-bar honey-pot baby-bottle
teacup-without-handle wine-glass beer-mug
"""
CLUTTER = _CLUTTER.split()

_SKIMAGE = "scikit-image/skimage/data/"
_OPENCV = "opencv/usr/share/doc/opencv-doc/examples/data/"
_TRAINING = {
    _SKIMAGE: """
        astronaut.png camera.png coins.png grass.png hubble_deep_field.jpg moon.png text.png page.png
        retina.jpg
    """,
    _OPENCV: """
        baboon.jpg blox.jpg box_in_scene.png graf1.png graf3.png left.jpg right.jpg rubberwhale1.png
        squirrel_cls.jpg starry_night.jpg stuff.jpg sudoku.png left01.jpg right07.jpg cards.png pic2.png
        detect_blob.png smarties.png board.jpg imageTextN.png text_motion.jpg ela_original.jpg
    """,
}
_HELD_OUT = {
    _SKIMAGE: "coffee.png rocket.jpg gravel.png ihc.png brick.png",
    _OPENCV: "home.jpg building.jpg leuvenA.jpg leuvenB.jpg aero1.jpg aero3.jpg",
}
TRAINING_PHOTOS = [folder + name for folder, names in _TRAINING.items() for name in names.split()]
HELD_OUT_PHOTOS = [folder + name for folder, names in _HELD_OUT.items() for name in names.split()]
_CLIP_FOLDERS = ("shapes", "signs_and_symbols", "geography", "decorations", "people")


@dataclass(frozen=True)
class Style:
    """How a set of scenes is drawn."""

    held_out: bool = False
    styles: tuple[str, ...] = TRAINING_STYLES
    dense: float = 0.0


@dataclass
class Scene:
    """A picture, its instance map (0 = background, i + 1 = objects[i]) and its objects."""

    pixels: np.ndarray
    instances: np.ndarray
    objects: list[dict] = field(default_factory=list)


def _trim(image: Image.Image) -> Image.Image:
    """Crop to the opaque part and shrink to the sprite size."""
    image = image.crop(image.getchannel("A").getbbox())
    image.thumbnail((SPRITE, SPRITE), Image.Resampling.LANCZOS)
    return image


def _draw_sprites() -> dict[str, dict[str, Image.Image]]:
    """Sprites by style and name; clutter is named ``~name``."""
    bank: dict[str, dict[str, Image.Image]] = {}
    folder = SOURCES / "fluent-3d" / "package" / "assets"
    bank["fluent-3d"] = {
        name: _trim(Image.open(folder / f"{codes[0]}.webp").convert("RGBA")) for name, codes in CATALOGUE.items()
    }
    characters = json.loads((SOURCES / "noto" / "package" / "chars.json").read_text())
    for code, name in characters.items():
        path = folder / f"{code}.webp"
        if name in CLUTTER and path.exists():
            bank["fluent-3d"]["~" + name] = _trim(Image.open(path).convert("RGBA"))
    for key in ICONIFY:
        icons = IconSet(key)
        sprites = bank.setdefault(key, {})
        for name, codes in CATALOGUE.items():
            icon = codes[2] if key == "fxemoji" else codes[1]
            drawing = icons.draw(icon, 160) if icon else None
            if drawing is not None:
                sprites[name] = _trim(drawing)
        for name in CLUTTER:
            drawing = icons.draw(name, 160)
            if drawing is not None:
                sprites["~" + name] = _trim(drawing)
    return bank


def _clip_art(held_out: bool) -> list[Image.Image]:
    """A fixed choice of clip-art pictures whose file names mention no kind; two disjoint halves."""
    root = SOURCES / "openclipart" / "usr" / "share" / "openclipart" / "png"
    found = []
    for folder in _CLIP_FOLDERS:
        for path in sorted((root / folder).rglob("*.png")):
            relative = path.relative_to(root).as_posix()
            code = zlib.crc32(relative.encode())
            named = any(name in relative.lower() for name in KINDS)
            if named or "flower" in relative or (code % 4 == 0) != held_out or code % 7 > 1:
                continue
            image = Image.open(path)
            if max(image.size) > 3000:
                continue
            image = image.convert("RGBA")
            if image.getchannel("A").getbbox():
                found.append(_trim(image))
    return found


class Bank:
    """Drawings, photographs and fonts, loaded once a process."""

    def __init__(self, held_out: bool) -> None:
        self.sprites = _draw_sprites()
        self.clips = _clip_art(held_out)
        self.photos = []
        for name in HELD_OUT_PHOTOS if held_out else TRAINING_PHOTOS:
            photo = Image.open(SOURCES / name).convert("RGB")
            photo.thumbnail((800, 800))
            self.photos.append(photo)
        self.fonts = [ImageFont.load_default(size) for size in range(16, 27)]


def _noise(rng: np.random.Generator) -> np.ndarray:
    """A procedural texture: several octaves of noise, sometimes with stripes."""
    texture = np.zeros((SIDE, SIDE, 3), np.float32) + rng.uniform(30, 225, 3)
    for cells in (3, 6, 14, 40, 110):
        amplitude = rng.uniform(0, 38)
        channels = 3 if rng.random() < 0.5 else 1
        grid = rng.normal(0, 1, (cells, cells, channels)).clip(-2, 2).repeat(3 // channels, 2)
        layer = Image.fromarray(((grid + 2) * 63.7).astype("uint8")).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        texture += amplitude * (np.asarray(layer, np.float32) / 63.7 - 2)
    if rng.random() < 0.3:
        axis = np.arange(SIDE)
        phase = (axis * rng.normal() + axis[:, None] * rng.normal()) * rng.uniform(0.05, 0.6)
        texture += (np.sin(phase) * rng.uniform(5, 45))[..., None]
    return texture


def _photo(bank: Bank, draw: random.Random, width: int, height: int) -> Image.Image:
    """A random crop of a random photograph."""
    photo = draw.choice(bank.photos)
    short = min(photo.size)
    size = int(short * draw.uniform(0.45, 1.0))
    left = draw.randint(0, photo.width - size)
    top = draw.randint(0, photo.height - size)
    crop = photo.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + size, top + size))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else crop


def _background(bank: Bank, style: Style, draw: random.Random, rng: np.random.Generator) -> np.ndarray:
    """A background, strongly recoloured in training and hardly in evaluation."""
    if style.held_out:
        pixels = np.asarray(_photo(bank, draw, SIDE, SIDE), np.float32)
        return (pixels * rng.uniform(0.85, 1.1) + rng.uniform(-10, 10)).clip(0, 255)
    plain = draw.random() < 0.25
    pixels = _noise(rng) if plain else np.asarray(_photo(bank, draw, SIDE, SIDE), np.float32)
    if draw.random() < 0.4:
        pixels = pixels[..., draw.sample(range(3), 3)]
    if draw.random() < 0.12:
        pixels = 255 - pixels
    if draw.random() < 0.5:
        pixels = (pixels - 128) * rng.uniform(0.4, 1.2) + 128 + rng.uniform(-40, 40, 3)
    return pixels.clip(0, 255)


def _transform(
    sprite: Image.Image, size: int, turn: float, draw: random.Random, jitter: float, rng: np.random.Generator
) -> np.ndarray:
    """Scale, flip, turn and recolour a sprite; float RGBA, cropped to its opaque part."""
    scale = size / max(sprite.size)
    if draw.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    shape = (max(8, round(sprite.width * scale)), max(8, round(sprite.height * scale)))
    sprite = sprite.resize(shape, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if draw.random() < 0.7:
        sprite = sprite.rotate(draw.uniform(-turn, turn), Image.Resampling.BILINEAR, expand=True)
        sprite = sprite.crop(sprite.getchannel("A").getbbox())
    if draw.random() < 0.15:
        sprite = sprite.filter(ImageFilter.GaussianBlur(0.8))
    pixels = np.asarray(sprite, np.float32).copy()
    gain = rng.uniform(1 - jitter, 1 + jitter, 3) * rng.uniform(1 - jitter, 1 + jitter)
    pixels[..., :3] = (pixels[..., :3] * gain + rng.uniform(-18, 18)).clip(0, 255)
    return pixels


def _cut_out(bank: Bank, style: Style, draw: random.Random) -> Image.Image:
    """One unlabelled thing: clip art, another drawing, a photo cut-out or a coloured shape."""
    chance = draw.random()
    if chance < 0.3:
        return draw.choice(bank.clips)
    if chance < 0.6:
        sprites = bank.sprites[draw.choice(style.styles)]
        return sprites[draw.choice([name for name in sprites if name[0] == "~"])]
    width = draw.randint(40, SPRITE)
    height = draw.randint(40, SPRITE)
    if chance < 0.85:
        image = _photo(bank, draw, width, height)
    else:
        image = Image.new("RGB", (width, height), tuple(draw.randint(0, 255) for _ in range(3)))
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    shape = draw.random()
    if shape < 0.4:
        pen.ellipse((1, 1, width - 2, height - 2), fill=255)
    elif shape < 0.6:
        pen.rectangle((1, 1, width - 2, height - 2), fill=255)
    else:
        corners = [(draw.randint(0, width), draw.randint(0, height)) for _ in range(draw.randint(3, 6))]
        pen.polygon([(0, height // 2), *corners, (width, height // 2)], fill=255)
    image = image.convert("RGBA")
    image.putalpha(mask)
    return image


def _sign(bank: Bank, draw: random.Random) -> tuple[str, np.ndarray]:
    """A sign: a coloured plate with a meaningless word."""
    colour = draw.choice(list(COLOURS))
    text = "".join(draw.choice("ABCDEFGHIKLMNOPRSTUVXYZ") for _ in range(draw.randint(3, 6)))
    font = draw.choice(bank.fonts)
    left, top, right, bottom = font.getbbox(text)
    pad = draw.randint(5, 10)
    size = (int(right - left) + 2 * pad, int(bottom - top) + 2 * pad)
    plate = tuple(max(0, min(255, value + draw.randint(-12, 12))) for value in COLOURS[colour])
    ink = (250, 250, 250, 255) if colour in ("red", "green", "blue", "black") else (15, 15, 15, 255)
    image = Image.new("RGBA", size, (*plate, 255))
    pen = ImageDraw.Draw(image)
    pen.text((pad - left, pad - top), text, font=font, fill=ink)
    pen.rectangle((1, 1, size[0] - 2, size[1] - 2), outline=ink)
    return colour, np.asarray(image, np.float32)


def _blend(scene: Scene, pixels: np.ndarray, left: int, top: int, instance: int) -> None:
    """Paste RGBA pixels, clipped at the border; instance 0 leaves the labels alone."""
    bottom = min(SIDE, top + pixels.shape[0])
    right = min(SIDE, left + pixels.shape[1])
    if bottom <= 0 or right <= 0:
        return
    pixels = pixels[max(0, -top) : bottom - top, max(0, -left) : right - left]
    rows = slice(max(0, top), bottom)
    columns = slice(max(0, left), right)
    alpha = pixels[..., 3:] / 255.0
    target = scene.pixels[rows, columns]
    target *= 1 - alpha
    target += pixels[..., :3] * alpha
    if instance:
        scene.instances[rows, columns][pixels[..., 3] > 127] = instance


def _add(scene: Scene, pixels: np.ndarray, left: int, top: int, kind: str, **more: str) -> None:
    """Paste an object and note it."""
    _blend(scene, pixels, left, top, len(scene.objects) + 1)
    box = [left, top, left + pixels.shape[1], top + pixels.shape[0]]
    scene.objects.append({"kind": kind, "box": box, **more})


def _free(scene: Scene, width: int, height: int, draw: random.Random) -> tuple[int, int] | None:
    """A place that touches no object's box, or None after 40 tries."""
    gap = 3
    for _ in range(40):
        left = draw.randint(0, SIDE - width)
        top = draw.randint(0, SIDE - height)
        for x0, y0, x1, y1 in (thing["box"] for thing in scene.objects):
            beside = left + width + gap <= x0 or x1 + gap <= left
            if not beside and top + height + gap > y0 and y1 + gap > top:
                break
        else:
            return left, top
    return None


_TIMES = {
    (3, 2, 1): 5,
    (3, 1, 1): 3,
    (2, 1, 1): 3,
    (2, 2, 1): 2,
    (3, 2): 1,
    (1, 1, 1): 2,
    (3, 1): 1,
    (2, 1): 1,
    (3, 3): 1,
}
MULTIPLICITIES = [counts for counts, times in _TIMES.items() for _ in range(times)]
"""How often the kinds of a scene appear; entries are equally likely."""


def _pick(bank: Bank, style: Style, draw: random.Random, name: str, fixed: str | None) -> Image.Image:
    """A drawing of a name in the scene's style, or in any style that has it."""
    if fixed and name in bank.sprites[fixed]:
        return bank.sprites[fixed][name]
    return bank.sprites[draw.choice([key for key in style.styles if name in bank.sprites[key]])][name]


def render(bank: Bank, style: Style, seed: int) -> Scene:
    """Draw the scene of a seed."""
    draw = random.Random(seed)
    rng = np.random.default_rng(seed)
    scene = Scene(_background(bank, style, draw, rng).copy(), np.zeros((SIDE, SIDE), np.uint8))
    for _ in range(draw.randint(4, 11)):
        cut_out = _transform(_cut_out(bank, style, draw), draw.randint(26, 95), 180, draw, 0.25, rng)
        _blend(scene, cut_out, draw.randint(-20, SIDE - 30), draw.randint(-20, SIDE - 30), 0)
    jitter = 0.08 if style.held_out else 0.14
    fixed = draw.choice(style.styles) if draw.random() < 0.5 else None
    if draw.random() < style.dense:
        _fill(scene, bank, style, draw, rng, fixed)
        return scene
    if draw.random() < 0.5:
        colour, plate = _sign(bank, draw)
        place = _free(scene, plate.shape[1], plate.shape[0], draw)
        if place:
            _add(scene, plate, *place, SIGN, colour=colour)
    counts = draw.choice(MULTIPLICITIES)
    names = draw.sample(NAMES, len(counts))
    for name, count in zip(names, counts, strict=True):
        for _ in range(count):
            sprite = _pick(bank, style, draw, name, fixed)
            pixels = _transform(sprite, draw.randint(40, 82), 25, draw, jitter, rng)
            place = _free(scene, pixels.shape[1], pixels.shape[0], draw)
            if place:
                _add(scene, pixels, *place, name)
    return scene


def _fill(
    scene: Scene, bank: Bank, style: Style, draw: random.Random, rng: np.random.Generator, fixed: str | None
) -> None:
    """Fill a jittered grid with many objects: dense supervision for the tower."""
    cells = draw.choice((4, 5))
    cell = SIDE // cells
    for row in range(cells):
        for column in range(cells):
            chance = draw.random()
            if chance < 0.22:
                continue
            if chance < 0.3:
                colour, pixels = _sign(bank, draw)
                more = {"kind": SIGN, "colour": colour}
            else:
                name = draw.choice(NAMES)
                size = draw.randint(36, min(cell, 84))
                pixels = _transform(_pick(bank, style, draw, name, fixed), size, 25, draw, 0.14, rng)
                more = {"kind": name}
            height, width = pixels.shape[:2]
            if height > cell or width > cell:
                continue
            left = column * cell + draw.randint(0, cell - width)
            top = row * cell + draw.randint(0, cell - height)
            _add(scene, pixels, left, top, **more)


def areas(instances: np.ndarray) -> np.ndarray:
    """For every patch the number of patches of its instance (0 = background), uint8."""
    flat = instances.reshape(-1)
    size = np.bincount(flat)
    size[0] = 0
    return size[flat].clip(0, 255).astype(np.uint8).reshape(instances.shape)


def labels(scene: Scene) -> np.ndarray:
    """The planes of PLANES for every patch in raster order, uint8 (4, 576)."""
    things = len(scene.objects)
    cells = scene.instances.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    share = np.stack([(cells == index).mean(1) for index in range(things + 1)], 1)
    planes = np.zeros((4, GRID * GRID), np.uint8)
    planes[2] = ((1 - share[:, 0]) * 255).astype(np.uint8)
    if not things:
        return planes
    top = share[:, 1:].argmax(1)
    covered = share[np.arange(GRID * GRID), top + 1]
    classes = np.array([KINDS.index(thing["kind"]) + 1 for thing in scene.objects])
    solid = covered >= FOREGROUND
    planes[0][solid] = classes[top[solid]]
    planes[1][solid] = top[solid] + 1
    planes[0][~solid & (share[:, 0] < 0.95)] = IGNORE
    planes[3] = areas(planes[1])
    return planes


_BANKS: dict[bool, Bank] = {}


def bank_for(held_out: bool) -> Bank:
    """The process's bank of training or held-out material."""
    if held_out not in _BANKS:
        _BANKS[held_out] = Bank(held_out)
    return _BANKS[held_out]


def _render_range(job: tuple[str, int, int, int, Style]) -> list[list[dict]]:
    """Render a range of scenes into the memory maps of a set."""
    name, start, stop, seed, style = job
    pictures = np.load(RUNS / "testbed" / f"{name}_pictures.npy", mmap_mode="r+")
    planes = np.load(RUNS / "testbed" / f"{name}_labels.npy", mmap_mode="r+")
    bank = bank_for(style.held_out)
    objects = []
    for index in range(start, stop):
        scene = render(bank, style, seed * 1_000_003 + index)
        pictures[index] = scene.pixels.clip(0, 255).astype(np.uint8)
        planes[index] = labels(scene)
        objects.append(scene.objects)
    return objects


@dataclass
class SceneSet:
    """A rendered set on disk."""

    pictures: np.ndarray
    labels: np.ndarray
    objects: list[list[dict]]

    def __len__(self) -> int:
        return len(self.objects)


def build(name: str, count: int, seed: int, style: Style, workers: int = 2) -> SceneSet:
    """Render a set once and open it."""
    folder: Path = RUNS / "testbed"
    folder.mkdir(parents=True, exist_ok=True)
    meta = folder / f"{name}_objects.json"
    if not meta.exists():
        for suffix, shape in (("pictures", (SIDE, SIDE, 3)), ("labels", (4, GRID * GRID))):
            path = folder / f"{name}_{suffix}.npy"
            np.lib.format.open_memmap(path, "w+", np.uint8, (count, *shape)).flush()
        step = max(1, count // (8 * workers))
        jobs = [(name, start, min(start + step, count), seed, style) for start in range(0, count, step)]
        with Pool(workers) as pool:
            objects = [thing for part in pool.imap(_render_range, jobs) for thing in part]
        meta.write_text(json.dumps(objects))
    pictures = np.load(folder / f"{name}_pictures.npy", mmap_mode="r")
    return SceneSet(pictures, np.load(folder / f"{name}_labels.npy"), json.loads(meta.read_text()))
