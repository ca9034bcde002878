"""From text and pictures, through the families' processors, to a patched model's answer; families that are refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_internvl import with_positions
from test_qwen import CLOSE, check_sets, generate, oracle
from tiny_internvl import SIDE, tiny_internvl
from tiny_qwen import PATCH, tiny_qwen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3Model,
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    PaliGemmaConfig,
    PaliGemmaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLProcessor,
)

import lp_patch


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
    processor = without_video({"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}[kind])
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


def images_of(ids, token):
    """Rows -> images -> positions: runs of placeholders."""
    found = []
    for row in ids.tolist():
        found.append([])
        for position in [p for p, i in enumerate(row) if i == token]:
            if found[-1] and found[-1][-1][-1] == position - 1:
                found[-1][-1].append(position)
            else:
                found[-1].append([position])
    return found


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_from_text_and_pictures_to_an_answer(kind):
    model, processor, place = internvl() if kind == "internvl" else qwen(kind)
    pictures = [picture(48, 24, 0), picture(40, 40, 1), picture(30, 60, 2)]
    texts = [f"What is in the picture?{place}", f"{place}A cat is{place} on the mat. What is in the picture?"]
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    where = images_of(inputs["input_ids"], model.config.image_token_id)
    assert [len(row) for row in where] == [1, 2]
    want = oracle(model, with_positions(inputs) if kind == "internvl" else inputs, where, ratio=1 / 3, layer=2)
    with lp_patch.applied(model, ratio=1 / 3, layer=2) as patch:
        out = generate(model, inputs)
        check_sets(patch.trace, want)
        torch.testing.assert_close(out.logits[0], want.logits[:, -1], **CLOSE)
        for row, (text, own) in enumerate(zip(texts, [pictures[:1], pictures[1:]], strict=True)):
            alone = generate(model, processor(text=[text], images=own, return_tensors="pt"))
            assert [x.tolist() for x in patch.trace.stage2] == [want.stage2[row]]
            assert alone.sequences[0, -len(out.logits) :].tolist() == out.sequences[row, -len(out.logits) :].tolist()
    assert all(processor.batch_decode(out.sequences[:, -len(out.logits) :]))


TEXT = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


REFUSED = {
    "gemma3": lambda: Gemma3Model(Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)),
    "paligemma": lambda: PaliGemmaModel(
        PaliGemmaConfig(text_config={"model_type": "gemma", **TEXT}, vision_config=VISION)
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_families_that_do_not_fit_are_refused_with_the_reason(kind):
    model = REFUSED[kind]()
    with pytest.raises(lp_patch.UnsupportedModelError, match=r"cannot be pruned: .* in both directions.* Supported mo"):
        lp_patch.apply(model)
    assert not lp_patch.is_applied(model)
