"""Mistral 3, Idefics3 and SmolVLM against the masked oracle; the families' processors; families that are refused."""

import importlib
import sys
from functools import partial

import numpy as np
import pytest
import tiny_others as others
import torch
from masked import expected
from PIL import Image
from test_internvl import with_positions
from test_qwen import CLOSE, check_second_image, check_sets, generate, split_options
from tiny import CACHE
from tiny_internvl import SIDE, tiny_internvl
from tiny_qwen import KINDS, PATCH, tiny_qwen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMImageProcessorPil,
    pipeline,
)
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.smolvlm import processing_smolvlm
from transformers.video_utils import VideoMetadata

import lp_patch
from lp_patch.adapters.idefics3 import split_images

CASES = {
    "tokens": {"tokens": 4, "layer": 2},
    "learned": {"ratio": 1 / 4, "layer": 2, "pruner": True},
    "wipe": {"tokens": 3, "layer": 2, "wipe": 4},
}
MIXED = {
    "mistral3": [(3, ("image", 3, 4), 5), (2, ("image", 2, 5), ("image", 4, 3), 3), (6,)],
    "idefics3": [
        (6,),
        (3, ("image", 2, 2), 5),
        (2, ("image", 1, 1), ("image", 1, 2), 1, ("image", 2, 1), ("image", 1, 1), ("image", 1, 1), 3),
        (("image", 1, 1), 4),
    ],
}


def rows_of(kind):
    parts = MIXED["mistral3" if kind == "mistral3" else "idefics3"]
    return [others.prompt(kind, *row, seed=i) for i, row in enumerate(parts)]


def masked(model, inputs, where, **options):
    language_model = model.get_decoder()
    return expected(model, language_model.layers, language_model, inputs, where, **options)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", others.KINDS)
def test_forward(kind, case, side):
    model = others.tiny(kind, seed=1)
    ours, theirs = split_options(CASES[case])
    rows = rows_of(kind)
    inputs = others.batch(kind, rows, side=side)
    want = masked(model, inputs, others.visual(rows, side), **theirs)
    with lp_patch.applied(model, **ours) as patch:
        out = model(**inputs)
        check_sets(patch.trace, want)
        torch.testing.assert_close(out.logits[want.left], want.logits[want.left], **CLOSE)
        for i, row in enumerate(rows):
            alone = model(**others.batch(kind, [row])).logits[0]
            torch.testing.assert_close(out.logits[i][inputs["attention_mask"][i].bool()], alone, **CLOSE)
            assert patch.trace.stage2[0].tolist() == want.stage2[i]


@pytest.mark.parametrize("case", ["tokens", "wipe"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", others.KINDS)
def test_generate(kind, beams, case):
    model = others.tiny(kind, seed=2)
    ours, theirs = split_options(CASES[case])
    rows = rows_of(kind)
    inputs = others.batch(kind, rows)
    del inputs["position_ids"]
    width = inputs["input_ids"].shape[1]
    search = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": 0.0} if beams > 1 else {}
    with lp_patch.applied(model, **ours) as patch:
        out = generate(model, inputs, output_scores=True, **search)
    grown = [{**rows[i // beams], "ids": rows[i // beams]["ids"] + s[width:].tolist()} for i, s in enumerate(out[0])]
    want = masked(model, others.batch(kind, grown), others.visual(grown), end=width, **theirs)
    check_sets(patch.trace, want)
    steps = want.logits[:, width - 1 : -1]
    if beams == 1:
        torch.testing.assert_close(torch.stack(out.logits, dim=1), steps, **CLOSE)
        return
    # a beam's score is the oracle's log-likelihood of what it says
    likely = steps.log_softmax(-1).gather(2, out.sequences[:, width:, None]).sum(dim=(1, 2))
    torch.testing.assert_close(out.sequences_scores, likely, **CLOSE)


@pytest.mark.parametrize("second", ["text", "image"])
@pytest.mark.parametrize("kind", others.KINDS)
def test_second_turn_on_a_kept_cache(kind, second):
    model = others.tiny(kind, seed=3)
    parts = (2, ("image", 2, 5), 4) if second == "image" else (5,)
    first, second = others.prompt(kind, 3, ("image", 3, 4), 5), others.prompt(kind, *parts, seed=7)
    with lp_patch.applied(model, tokens=4, layer=2) as patch:
        out = generate(model, others.batch(kind, [first]))
        one = patch.trace
        said = out.sequences[0].tolist()
        end = len(said) + len(second["ids"])
        again = {**others.batch(kind, [second]), "input_ids": torch.tensor([said + second["ids"]])}
        again |= {"attention_mask": torch.ones(1, end, dtype=torch.long)}
        del again["position_ids"]
        out = generate(model, again, **{CACHE: out[CACHE]})
        two = patch.trace
    longer = {name: first[name] + second[name] for name in ("images", "sizes")}
    longer["ids"] = said + second["ids"] + out.sequences[0, end:].tolist()
    longer["visual"] = first["visual"] + [[p + len(said) for p in x] for x in second["visual"]]
    inputs, language_model = others.batch(kind, [longer]), model.get_decoder()
    if second["images"]:
        check_second_image(
            model, inputs, *longer["visual"], (one, two), end, out.logits, tokens=4, k=2, language_model=language_model
        )
        return
    want = masked(model, inputs, others.visual([longer]), end=len(first["ids"]), tokens=4, layer=2)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), want.logits[:, end - 1 : -1], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", others.KINDS)
def test_nothing_to_prune_and_removal_bit_for_bit(kind):
    model = others.tiny(kind, dtype=torch.float32)
    inputs, text = others.batch(kind, rows_of(kind), torch.float32), others.batch(kind, [others.prompt(kind, 9)])
    before, state = model(**inputs), dict(vars(model.model))
    silent = model(**text).logits
    with lp_patch.applied(model, ratio=1.0):
        full = model(**inputs)
        assert torch.equal(full.logits, before.logits)
    with lp_patch.applied(model, tokens=3, layer=2):
        assert torch.equal(model(**text).logits, silent)
        assert not torch.equal(model(**inputs).logits, before.logits)
    assert vars(model.model).keys() == state.keys()
    assert torch.equal(model(**inputs).logits, before.logits)


@pytest.mark.parametrize("kind", others.KINDS)
def test_what_does_not_fit_is_refused(kind):
    model = others.tiny(kind)
    with pytest.raises(lp_patch.ConfigError, match=r"scorer='cls' needs a \[CLS\] token .*, which .* does not have"):
        lp_patch.apply(model, scorer="cls")
    with pytest.raises(lp_patch.PrunerError):
        lp_patch.apply(model, pruner=lp_patch.LearnablePruner(others.HIDDEN + 1, 8))
    assert not lp_patch.is_applied(model)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
def test_images_are_told_apart_by_token_ids_alone(kind):
    model = others.tiny(kind)
    inputs = others.batch(kind, rows_of(kind))
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with lp_patch.applied(model, tokens=4), pytest.raises(lp_patch.UnsupportedInputError, match="give input_ids"):
        model(**inputs)


def tokenizer(special, named):
    """A byte-level tokenizer of two sentences, whose first ids are `special`."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    inner.train_from_iterator(["What is in the picture?", "A cat is on the mat."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=special[0], eos_token=special[1], padding_side="left",
        extra_special_tokens=named,
    )  # fmt: skip


def without_video(processor):
    """A processor that needs no video processor, which torchvision would be needed for."""
    return type(processor.__name__, (processor,), {
        "get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])
    })  # fmt: skip


def picture(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def qwen(kind):
    names = ["<pad>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    processors = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}
    processor = without_video(processors.get(kind, Qwen3VLProcessor))
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    return tiny_qwen(kind, dtype=torch.float32, vocab_size=300), processor(
        image_processor=image_processor, tokenizer=tokenizer(names, {}), video_processor=None
    ), place  # fmt: skip


def internvl():
    names = ["<pad>", "<eos>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    named = dict(
        zip(["start_image_token", "end_image_token", "context_image_token", "video_token"], names[2:], strict=True)
    )
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = without_video(InternVLProcessor)(
        image_processor=image_processor, tokenizer=tokenizer(names, named), video_processor=None, image_seq_length=9
    )
    return tiny_internvl(dtype=torch.float32, vocab_size=300), processor, "<IMG_CONTEXT>"


def idefics3():
    names = ["<pad>", "<eos>", "<image>", "<fake_token_around_image>", "<global-img>", "\n", "\n\n"]
    names += [f"<row_{i}_col_{j}>" for i in (1, 2, 3) for j in (1, 2, 3)]
    side = {"longest_edge": others.SIDE}
    image_processor = Idefics3ImageProcessorPil(size={"longest_edge": 3 * others.SIDE}, max_image_size=side)
    processor = Idefics3Processor(image_processor, tokenizer(names, {}), image_seq_len=others.N)
    return others.tiny("idefics3", dtype=torch.float32, vocab_size=300), processor, "<image>"


def mistral3():
    folder = "transformers.models.pixtral"
    with pytest.MonkeyPatch.context() as patch:
        # the processor wants torchvision for one function, which the module for Pillow has as well
        patch.setitem(sys.modules, f"{folder}.image_processing_pixtral", image_processing_pil_pixtral)
        processor = importlib.import_module(f"{folder}.processing_pixtral").PixtralProcessor
    image_processor = image_processing_pil_pixtral.PixtralImageProcessorPil(
        patch_size={"height": others.PATCH, "width": others.PATCH}, size={"longest_edge": 64}
    )
    return others.tiny("mistral3", dtype=torch.float32, vocab_size=300), processor(
        image_processor, tokenizer(["<pad>", "<eos>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"], {}),
        patch_size=others.PATCH, spatial_merge_size=2,
    ), "[IMG]"  # fmt: skip


def smolvlm():
    names = ["<pad>", "<eos>", "<image>", "<fake_token_around_image>", "<global-img>", "\n", "\n\n", "<video>"]
    names += [f"<row_{i}_col_{j}>" for i in (1, 2, 3) for j in (1, 2, 3)]

    processing_smolvlm.num2words = processing_smolvlm.num2words or str  # a package that says "three" for 3

    class Offline(processing_smolvlm.SmolVLMProcessor):
        def check_argument_for_proper_class(self, name, argument):
            return type(argument)  # our stand-in is no video processor

    image_processor = SmolVLMImageProcessorPil(
        size={"longest_edge": 3 * others.SIDE}, max_image_size={"longest_edge": others.SIDE}
    )
    processor = Offline(image_processor, tokenizer(names, {}), three_frames, image_seq_len=others.N)
    return others.tiny("smolvlm", dtype=torch.float32, vocab_size=300), processor, "<image>"


def three_frames(videos, **_):
    """What SmolVLM's video processor makes of arrays (3, SIDE, SIDE, 3) of bytes; it wants torchvision."""
    pixels = torch.stack([torch.as_tensor(video) for video in videos]).movedim(-1, 2) / 127.5 - 1
    seen = VideoMetadata(total_num_frames=3, fps=1.0, frames_indices=[0, 1, 2], duration=3.0)
    return {"pixel_values": pixels, "video_metadata": [seen] * len(videos)}


FAMILIES = {
    "mistral3": mistral3,
    "smolvlm": smolvlm,
    **{kind: partial(qwen, kind) for kind in KINDS},
    "internvl": internvl,
    "idefics3": idefics3,
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_from_text_and_pictures_to_an_answer(kind):
    model, processor, place = FAMILIES[kind]()
    image = model.config.image_token_id
    pictures = [picture(48, 24, 0), picture(40, 40, 1), picture(30, 60, 2)]
    counts = [
        int((processor(text=[place], images=[p], return_tensors="pt")["input_ids"] == image).sum()) for p in pictures
    ]
    texts = [f"What is in the picture?{place}", f"{place}A cat is{place} on the mat. What is in the picture?"]
    inputs = processor(text=texts, images=[pictures[:1], pictures[1:]], padding=True, return_tensors="pt")
    assert len(set(counts)) > 1
    positions = [(ids == image).nonzero().flatten() for ids in inputs["input_ids"]]
    where = [[positions[0].tolist()], [x.tolist() for x in positions[1].split(counts[1:])]]
    counted = inputs if kind.startswith("qwen") else with_positions(inputs)
    want = masked(model, counted, where, ratio=1 / 3, layer=2)
    with lp_patch.applied(model, ratio=1 / 3, layer=2) as patch:
        out = generate(model, inputs)
        check_sets(patch.trace, want)
        torch.testing.assert_close(out.logits[0], want.logits[:, -1], **CLOSE)
        for row, (text, own) in enumerate(zip(texts, [pictures[:1], pictures[1:]], strict=True)):
            alone = generate(model, processor(text=[text], images=own, return_tensors="pt"))
            assert [x.tolist() for x in patch.trace.stage2] == [want.stage2[row]]
            assert alone.sequences[0, -len(out.logits) :].tolist() == out.sequences[row, -len(out.logits) :].tolist()
        said = processor.batch_decode(out.sequences[:, -len(out.logits) :], skip_special_tokens=True)
        ask = pipeline("image-text-to-text", model=model, processor=processor)
        options = {"max_new_tokens": len(out.logits), "do_sample": False}
        answer = ask(text=texts[0], images=pictures[:1], return_full_text=False, generate_kwargs=options)
    assert said[0] and answer[0]["generated_text"] == said[0]


@torch.no_grad()
def test_idefics3s_processor_writes_what_the_adapter_reads():
    """Several images in a row, of one tile and of many, with nothing between them."""
    _, processor, place = idefics3()
    pictures = [picture(24, 24, 0), picture(60, 30, 1), picture(72, 72, 2), picture(20, 20, 3), picture(24, 72, 4)]
    text = f"{place}{place}{place} A cat{place}\n{place} What is in the picture?"
    ids = processor(text=[text], images=[pictures], return_tensors="pt")["input_ids"][0]
    positions = (ids == processor.image_token_id).nonzero().flatten()
    tiles = [processor.image_processor([[p]], return_tensors="pt")["pixel_values"].shape[1] for p in pictures]
    assert len(set(tiles)) > 1
    assert split_images(ids, positions) == [n * others.N for n in tiles]


@pytest.mark.parametrize("before", [[], [7], [7, 7, 7]])
def test_images_without_idefics3s_tokens_around_them(before):
    ids = torch.tensor([*before, *[others.IMAGE] * 4, 8, 9, 8, *[others.IMAGE] * 2, 9, *[others.IMAGE] * 3])
    assert split_images(ids, (ids == others.IMAGE).nonzero().flatten()) == [4, 2, 3]


TEXT = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def tiny_mllama():
    vision = {**VISION, "attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 32, "max_num_tiles": 1}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    text = {**TEXT, "cross_attention_layers": [1], "pad_token_id": 0}
    return MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))


def test_mllama_is_refused_with_the_reason():
    """As `tests/test_mapping.py` asks of each type that does not fit, here of a whole model."""
    model = tiny_mllama()
    why = "it reads pictures through cross-attention, so its prompt holds no visual tokens"
    with pytest.raises(
        lp_patch.UnsupportedModelError, match=rf"'mllama'\) cannot be pruned: {why}\. lp_patch.supported"
    ):
        lp_patch.apply(model)
    assert not lp_patch.is_applied(model)


@torch.no_grad()
def test_smolvlms_processor_writes_a_video_as_images():
    model, processor, _ = smolvlm()
    video = np.random.default_rng(3).integers(0, 255, (3, others.SIDE, others.SIDE, 3), dtype=np.uint8)
    inputs = processor(text=["What is <video> in the picture?"], videos=[video], return_tensors="pt")
    at = (inputs["input_ids"][0] == others.IMAGE).nonzero().flatten().tolist()
    frames = [at[i : i + others.N] for i in range(0, len(at), others.N)]
    assert [x[-1] - x[0] for x in frames] == [others.N - 1] * 3  # each frame by itself, text between them
    want = masked(model, with_positions(inputs), [frames], tokens=2, layer=2)
    with lp_patch.applied(model, tokens=2, layer=2) as patch:
        out = generate(model, inputs)
    check_sets(patch.trace, want)
    assert len(patch.trace.stage1[0]) == 3 * 6
    torch.testing.assert_close(out.logits[0], want.logits[:, -1], **CLOSE)
