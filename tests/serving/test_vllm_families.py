"""Tiny random models of each family: what vLLM says with the plugin is what transformers says with `apply`."""

import pytest
import torch
from asking import compare, expect, serve
from checkpoints import CONFIGS, PLACE, save
from PIL import Image
from torch.nn.functional import interpolate

SIZES = [(48, 24), (24, 24), (24, 72), (40, 40)]
NEW = 4
BLOCK = 32  # tokens of a block of the cache, the fewest on a CPU
BEFORE = 21  # the most tokens before the picture of the first two prompts


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: made(kind, tmp_path_factory.mktemp(kind)) for kind in CONFIGS}


def made(kind, folder):
    save(kind, folder)
    return folder


def pictures(count, seed):
    """Pictures of several sizes, with coarse random patterns."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n in range(count):
        width, height = SIZES[(seed + n) % len(SIZES)]
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        pixels = interpolate(coarse, size=(height, width))[0].permute(1, 2, 0)
        found.append(Image.fromarray((255 * pixels).byte().numpy()))
    return found


def prompts(kind):
    """One and two pictures of different sizes, next to each other too, first and last in a prompt; none; and turns that
    share a picture with others.
    """
    place, long = PLACE[kind], " ".join(f"w{n}" for n in range(20))
    one, two = pictures(1, 0), pictures(2, 1)
    return [
        (f"{long} {place} w3 w4 w5", one),
        (f"{long} {place} w3 w7", one),
        (f"{place} w8", pictures(1, 2)),
        (f"w9 {place} w3 {place} w4 w5", two),
        (f"w9 {place} {place} w6", two),
        (f"w9 {place} {place} w6 w2 {place}", [*two, *one]),
        (f"{long} w11 w20 {long}", []),
    ]


def check(folder, kind, options, asked, **engine):
    """Asked twice: the second time prompts and pictures are in the caches."""
    answered = serve(folder, options, [asked, asked], NEW, stop=False, max_model_len=200, block_size=BLOCK, **engine)
    wanted = expect(folder, options, asked, NEW, stop=False)
    for answers in answered:
        unequal, difference = compare(answers, wanted)
        assert unequal == 0 and difference < 1e-4, (kind, options, unequal, difference)
    return answered


@pytest.mark.parametrize("kind", CONFIGS)
def test_equal(folders, kind):
    """The second asking finds the first 32 tokens of a prompt in the cache, of which a part of its picture is one."""
    _, again = check(folders[kind], kind, {"tokens": 14, "scorer": "diversity"}, prompts(kind))
    assert [cached for *_, cached in again[:2]] == [BLOCK, BLOCK] and BEFORE < BLOCK < BEFORE + 14


@pytest.mark.parametrize("kind", CONFIGS)
def test_chunks(folders, kind):
    """A prompt in pieces of 24 tokens, so that pictures are parted, with a budget by share."""
    options = {"ratio": 0.8, "scorer": "uniform", "diversity": 0.0}
    check(folders[kind], kind, options, prompts(kind), max_num_batched_tokens=24)


@pytest.mark.parametrize("kind", CONFIGS)
def test_everything_kept(folders, kind):
    check(folders[kind], kind, {"ratio": 1.0}, prompts(kind))


@pytest.mark.parametrize("kind", ["internvl", "llava"])
def test_compact(folders, kind):
    check(folders[kind], kind, {"tokens": 4, "scorer": "diversity", "positions": "compact"}, prompts(kind))


@pytest.mark.parametrize("scorer", ["cls", "hiprune"])
def test_attention_of_the_tower(folders, scorer):
    check(folders["llava"], "llava", {"tokens": 5, "scorer": scorer}, prompts("llava"))


def test_many_at_once(folders):
    """Forty requests, those without a picture between those with one."""
    asked = [*prompts("qwen3_vl") * 6][:40]
    check(folders["qwen3_vl"], "qwen3_vl", {"tokens": 3, "scorer": "diversity"}, asked, max_num_seqs=40)
