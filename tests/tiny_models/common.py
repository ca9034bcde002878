"""Tiny random models of any type, and prompts for them: what `tests/test_types.py` asks of every type of this package.

A file of the package has a family: for each model type a `Tiny`, in its dict `TYPES`. Ids below FIRST are special, and
never said; a picture is what the type's processor would write for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import masked
import shortened
import torch
from torch.nn.functional import pad
from transformers import AutoModelForImageTextToText

PAD, EOS, IMAGE, VIDEO, START, END = range(6)
FIRST, VOCAB = 10, 60
LAYERS, HIDDEN = 6, 32
RECURRENT = {"linear_attention", "conv", "mamba"}  # layers on which nothing can be hidden


@dataclass
class Picture:
    """A visual input in a prompt, as its processor would write it.

    Attributes:
        ids: token ids, wrapping tokens included.
        visual: places in `ids` of its counted visual tokens.
        inputs: arguments of the forward; those of a batch's pictures are concatenated.
        structural: places in `ids` of placeholders that carry no picture.
    """

    ids: list[int]
    visual: list[int]
    inputs: dict[str, torch.Tensor]
    structural: list[int] = field(default_factory=list)


@dataclass
class Tiny:
    """A model type as the tests need it.

    Attributes:
        config: () -> its tiny config.
        picture: (generator, *what a row says of it) -> Picture.
        rows: three prompts, of one visual input, of several, and of none: an int is so many text tokens, a tuple what
            `picture` is given.
        typed: the argument that says of each token what it is, or None.
        types: what it says, by id, else 0; `said` of what is generated.
        positions: whether a caller may pass (B, S) position ids; False where the model counts several axes itself.
        collate: (rows of pictures) -> arguments, where these are not concatenated.
        patch: from the whole model, the one to patch and to run; the model itself by default.
        adjust: called with the finished model.
        oracle: keyword arguments for the oracle.
        layer: the options' `layer`.
        projector: path below the merging module of what stage 1 prunes before, or None.
        static: whether a static cache can be pruned, where stock runs on one.
        wipes: whether layers after that can lose all visual tokens.
    """

    config: Callable[[], Any]
    picture: Callable[..., Picture]
    rows: tuple = ((3, (), 5), (2, (), 1, (), 3), (6,))
    typed: str | None = None
    types: dict = field(default_factory=lambda: {IMAGE: 1, VIDEO: 2})
    said: int = 0
    positions: bool = True
    collate: Callable[[list[list[Picture]]], dict] | None = None
    patch: Callable[[Any], Any] = lambda model: model
    adjust: Callable[[Any], None] = lambda model: None
    oracle: dict = field(default_factory=dict)
    layer: int = 2
    projector: str | None = None
    static: bool = True
    wipes: bool = True


@dataclass
class Scene:
    """A batch. `visual`: rows -> visual inputs -> positions of their tokens; `structural`: rows -> positions."""

    tiny: Tiny
    inputs: dict
    visual: list
    structural: list

    @property
    def padded(self):
        """Whether any row is."""
        return not self.inputs["attention_mask"].all()

    def forward(self, new=None):
        """Keyword arguments of a forward; `new` (B, n) tokens were generated."""
        inputs, more = dict(self.inputs), 0 if new is None else new.shape[1]
        if more:
            inputs["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
            inputs["attention_mask"] = pad(inputs["attention_mask"], (0, more), value=1)
            if self.tiny.typed:
                inputs[self.tiny.typed] = pad(inputs[self.tiny.typed], (0, more), value=self.tiny.said)
        if self.tiny.positions:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return inputs

    def want(self, model, new=None, **options):
        """What the patched model must give, `new` tokens after the prompt included."""
        decoder = model.get_decoder()
        given = {"structural": self.structural, "end": self.inputs["input_ids"].shape[1], **self.tiny.oracle}
        if RECURRENT & set(getattr(decoder.config, "layer_types", None) or ()):
            given["run"] = shortened
        if self.tiny.projector is not None:
            given["features"] = self.projected(model)
        inputs = self.forward(new)
        return masked.expected(model, decoder.layers, decoder, inputs, self.visual, **{**given, **options})

    def projected(self, model):
        """Rows -> visual inputs -> (n, C): what the projector is given of each."""
        seen = []
        module = model.base_model.get_submodule(self.tiny.projector)
        handle = module.register_forward_pre_hook(lambda module, args: seen.extend(args[0]))
        with torch.no_grad():
            model(**self.forward())
        handle.remove()
        return [[seen.pop(0) for _ in row] for row in self.visual]


def text(generator, count):
    """So many ids."""
    return torch.randint(FIRST, VOCAB, (count,), generator=generator).tolist()


def scene(tiny, dtype=torch.float64, which=(0, 1, 2), side="left"):
    """A padded batch of some of the rows."""
    rows = []
    for number in which:
        generator = torch.Generator().manual_seed(number)
        row = {"ids": [], "pictures": [], "visual": [], "structural": []}
        for part in tiny.rows[number]:
            if isinstance(part, int):
                row["ids"] += text(generator, part)
                continue
            picture, start = tiny.picture(generator, *part), len(row["ids"])
            row["pictures"].append(picture)
            row["visual"].append([start + x for x in picture.visual])
            row["structural"] += [start + x for x in picture.structural]
            row["ids"] += picture.ids
        rows.append(row)
    length = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    visual, structural = [], []
    for i, row in enumerate(rows):
        shift = length - len(row["ids"]) if side == "left" else 0
        where = slice(shift, shift + len(row["ids"]))
        ids[i, where], mask[i, where] = torch.tensor(row["ids"]), 1
        visual.append([[shift + x for x in picture] for picture in row["visual"]])
        structural.append([shift + x for x in row["structural"]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if tiny.typed:
        inputs[tiny.typed] = sum((ids == token).int() * kind for token, kind in tiny.types.items()) + 0 * ids.int()
    pictures = [row["pictures"] for row in rows]
    if tiny.collate is not None:
        found = tiny.collate(pictures) if any(pictures) else {}
    else:
        names = {name for row in pictures for picture in row for name in picture.inputs}
        found = {n: torch.cat([p.inputs[n] for row in pictures for p in row if n in p.inputs]) for n in sorted(names)}
    inputs |= {n: x.to(dtype) if x.is_floating_point() else x for n, x in found.items()}
    return Scene(tiny, inputs, visual, structural)


def build(tiny, seed=0, dtype=torch.float64, attention="sdpa"):
    """The model, with weights large enough for attention to differ between tokens."""
    torch.manual_seed(seed)
    model = tiny.patch(AutoModelForImageTextToText.from_config(tiny.config())).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(0, 1.0)
            elif parameter.dim() > 1:
                fan_in = parameter.shape[-1] if "experts" in name else parameter[0].numel()
                parameter.normal_(0, 1.2 * fan_in**-0.5)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # random models must not stop at random
    model.generation_config.suppress_tokens = list(range(FIRST))  # nor speak of pictures
    model.set_attn_implementation(attention)
    if any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # the default computes in no float64
    tiny.adjust(model)
    return model


def text_config(model_type, **more):
    """A tiny Llama-like text config as a dict."""
    return {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        **more,
    }


def pixels(generator, *shape):
    """Random pictures, smooth enough for neighbouring patches to resemble each other: (..., H, W)."""
    *lead, height, width = shape
    coarse = torch.randn(1, *lead, max(2, height // 7), max(2, width // 7), generator=generator).flatten(0, -4)
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear").view(shape)


def placeholders(count, before=(), after=(), token=IMAGE):
    """(ids, places of the placeholders) of so many placeholders between wrapping ids."""
    return [*before, *[token] * count, *after], list(range(len(before), len(before) + count))
