"""The names, colours and words that the testbed knows, and the word-level tokenizer built from them."""

from __future__ import annotations

# name, code point in Fluent 3D, name in the Iconify sets, name in FxEmoji ("" = that style lacks it)
_CATALOGUE = """
cat 1f431 cat-face cat
dog 1f436 dog-face dog
panda 1f43c panda pandaface
fox 1f98a fox -
pig 1f437 pig-face pig
cow 1f42e cow-face cowface
rabbit 1f430 rabbit-face bunny
frog 1f438 frog frog
elephant 1f418 elephant elephant
turtle 1f422 turtle turtle
octopus 1f419 octopus octopus
bee 1f41d honeybee honeybee
ladybug 1f41e lady-beetle ladybeetle
snail 1f40c snail snail
penguin 1f427 penguin penguin
owl 1f989 owl -
crab 1f980 crab -
shark 1f988 shark -
whale 1f433 spouting-whale spurtingwhale
fish 1f420 tropical-fish tropicalfish
parrot 1f99c parrot -
apple 1f34e red-apple redapple
banana 1f34c banana banana
pineapple 1f34d pineapple pineapple
watermelon 1f349 watermelon watermelon
carrot 1f955 carrot -
mushroom 1f344 mushroom mushroom
eggplant 1f346 eggplant aubergine
pizza 1f355 pizza sliceofpizza
hamburger 1f354 hamburger hamburger
doughnut 1f369 doughnut doughnut
lollipop 1f36d lollipop lollipop
lemon 1f34b lemon lemon
cactus 1f335 cactus cactus
sunflower 1f33b sunflower sunflower
tulip 1f337 tulip tulip
tree 1f332 evergreen-tree evergreen
bus 1f68c bus bus
tractor 1f69c tractor tractor
rocket 1f680 rocket rocket
helicopter 1f681 helicopter helicopter
airplane 2708-fe0f airplane airplane
boat 26f5 sailboat -
bicycle 1f6b2 bicycle bicycle
car 1f697 automobile automobile
train 1f682 locomotive steamlocomotive
guitar 1f3b8 guitar guitar
trumpet 1f3ba trumpet trumpet
drum 1f941 drum -
key 1f511 key key
hammer 1f528 hammer hammer
umbrella 2614 umbrella-with-rain-drops umbrellawithraindrops
bell 1f514 bell bell
balloon 1f388 balloon balloon
camera 1f4f7 camera camera
candle 1f56f-fe0f candle candle
crown 1f451 crown crown
basketball 1f3c0 basketball -
anchor 2693 anchor anchor
house 1f3e0 house housebuilding
tent 26fa tent -
hat 1f3a9 top-hat tophat
clock 23f0 alarm-clock alarmclock
book 1f4d8 blue-book bluebook
bulb 1f4a1 light-bulb lightbulb
robot 1f916 robot -
skull 1f480 skull skull
ghost 1f47b ghost ghost
"""

CATALOGUE: dict[str, tuple[str, str, str]] = {
    row[0]: (row[1], row[2], "" if row[3] == "-" else row[3])
    for row in (line.split() for line in _CATALOGUE.strip().splitlines())
}
NAMES: list[str] = list(CATALOGUE)
SIGN = "sign"
KINDS: list[str] = [*NAMES, SIGN]
"""Labelled kinds; the class of KINDS[i] is i + 1, class 0 is background."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 35, 35),
    "green": (30, 140, 50),
    "blue": (35, 65, 200),
    "yellow": (245, 215, 40),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
CORNERS: dict[tuple[bool, bool], str] = {
    (False, False): "top left",
    (True, False): "top right",
    (False, True): "bottom left",
    (True, True): "bottom right",
}
"""Corner by (right half, bottom half)."""

NUMBERS = ["1", "2", "3"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
_WORDS = "user assistant : ? . is there a an in the image how many are of where what color"
_ANSWERS = "yes no top bottom left right"


def plural(name: str) -> str:
    """English plural of a kind; every irregular one was kept out of the catalogue, fish apart."""
    if name == "fish":
        return name
    return name + ("es" if name.endswith("s") else "s")


def words() -> list[str]:
    """The whole vocabulary in token order."""
    return [*SPECIAL, *_WORDS.split(), *_ANSWERS.split(), *NUMBERS, *COLOURS, *KINDS, "##s", "##es"]
