"""Every family's tiny model and a batch for it, in one form: what one test can ask of all of them.

A batch has rows with one visual input, with several (of other sizes, images and videos where the family takes both),
and with none, padded on the left. The oracle's answers come from `tests/masked.py`, which knows nothing of lp_patch.
"""

from dataclasses import dataclass
from functools import partial

import masked
import tiny
import tiny_internvl
import tiny_llava_family
import tiny_others
import tiny_qwen
import torch
from torch.nn.functional import pad

LLAVA = [(3, "image", 9), (2, "image", 4, "image", 3), (6,)]
TILED = [(3, "wide", 6), (2, "tall", 3, "small", 5), (7,)]
FRAMED = [(3, "video", 6), (2, "tall", 3, "video", 5), (7,)]
QWEN = [(3, ("image", 3, 4), 5, ("video", 3, 2, 2), 4), (2, ("image", 4, 2), 1, ("image", 5, 5), 3), (6,)]
INTERNVL = [(3, ("image", 3), 5), (2, ("image", 1), ("image", 2), 2, ("video", 2), 3), (6,)]
MISTRAL = [(3, ("image", 3, 4), 5), (2, ("image", 2, 5), ("image", 4, 3), 3), (6,)]
IDEFICS = [(3, ("image", 2, 2), 5), (2, ("image", 1, 1), ("image", 1, 2), 1, ("image", 2, 1), 3), (6,)]


@dataclass
class Scene:
    """A batch of one family.

    Attributes:
        inputs: keyword arguments of generate().
        visual: rows -> visual inputs -> the positions of their tokens in the padded batch.
        structural: rows -> positions of line breaks.
        projector: path of the module whose input stage 1 reads, below the merging module; None: its output.
    """

    inputs: dict
    visual: list
    structural: list | None = None
    projector: str | None = None

    def forward(self, new=None):
        """Keyword arguments of a forward; `new` (B, n) tokens were generated."""
        inputs, more = dict(self.inputs), 0 if new is None else new.shape[1]
        if more:
            inputs["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
            inputs["attention_mask"] = pad(inputs["attention_mask"], (0, more), value=1)
        if "mm_token_type_ids" in inputs:  # Qwen's models count their three axes from it
            return {**inputs, "mm_token_type_ids": pad(inputs["mm_token_type_ids"], (0, more))}
        return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}

    def features(self, model):
        """Rows -> visual inputs -> (n, C) that stage 1 reads, where that is not what the language model is given."""
        if self.projector is None:
            return None
        seen = []
        module = model.base_model.get_submodule(self.projector)
        handle = module.register_forward_pre_hook(lambda module, args: seen.extend(args[0]))
        with torch.no_grad():
            model(**self.forward())
        handle.remove()
        return [[seen.pop(0) for _ in row] for row in self.visual]

    def want(self, model, new=None, **options):
        """What the patched model must give, `new` tokens after the prompt included."""
        decoder, end = model.get_decoder(), self.inputs["input_ids"].shape[1]
        given = {"features": self.features(model), "structural": self.structural, "end": end, **options}
        return masked.expected(model, decoder.layers, decoder, self.forward(new), self.visual, **given)


class Original(Scene):
    """llava-torch: the prompt has one placeholder for each image, and grows in the model's own method."""

    def __init__(self, model, which):
        import tiny_original as original

        prompts = [[5, 6, original.IMAGE, 7, 8, 9], [original.IMAGE, 11, 12, original.IMAGE, 13], [14, 15, 16]]
        self.rows = [prompts[i] for i in which]
        pictures, given = original.pictures_of(self.rows)
        self.pictures, (ids, mask) = [x.to(model.dtype) for x in pictures], original.padded(self.rows, "left")
        self.inputs = {"inputs": ids, "attention_mask": mask, "images": given.to(model.dtype)}
        self.grown = original.Grown

    def forward(self, new=None):
        """As the package takes it."""
        ids = {"input_ids": self.inputs["inputs"]}
        return {**ids, **{name: x for name, x in self.inputs.items() if name != "inputs"}}

    def want(self, model, new=None, **options):
        return self.grown(model, self.rows, self.pictures, "left", () if new is None else new).want(**options)


def llava(model, which):
    prompts = [LLAVA[i] for i in which]
    rows = [tiny.tokens(*parts, seed=i) for i, parts in enumerate(prompts)]
    count = sum(parts.count("image") for parts in prompts)
    inputs = tiny.batch(rows, tiny.images(count, dtype=model.dtype) if count else None)
    at = [(ids == tiny.IMAGE).nonzero().flatten().tolist() for ids in inputs["input_ids"]]
    visual = [[x[i : i + tiny.N] for i in range(0, len(x), tiny.N)] for x in at]
    return Scene(inputs, visual, projector="multi_modal_projector")


def llava_family(parts, model, which):
    rows = [tiny_llava_family.row(model, *parts[i], seed=i) for i in which]
    inputs = tiny_llava_family.batch(rows)
    shifts = [inputs["input_ids"].shape[1] - len(x.ids) for x in rows]
    visual = [[[p + shift for p in x] for x in row.visual] for row, shift in zip(rows, shifts, strict=True)]
    structural = [[p + shift for p in row.structural] for row, shift in zip(rows, shifts, strict=True)]
    return Scene(inputs, visual, structural)


def qwen(kind, model, which):
    rows = [tiny_qwen.prompt(kind, *QWEN[i], seed=i) for i in which]
    return Scene(tiny_qwen.batch(rows, model.dtype), tiny_qwen.visual(rows))


def internvl(model, which):
    rows = [tiny_internvl.prompt(*INTERNVL[i], seed=i) for i in which]
    return Scene(tiny_internvl.batch(rows, model.dtype), tiny_internvl.visual(rows))


def other(kind, parts, model, which):
    rows = [tiny_others.prompt(kind, *parts[i], seed=i) for i in which]
    inputs = tiny_others.batch(kind, rows, model.dtype)
    del inputs["position_ids"]
    return Scene(inputs, tiny_others.visual(rows))


def original(**options):
    import tiny_original

    return tiny_original.tiny(**options, tokenizer_padding_side="left")


# family -> (its model, of seed, dtype and attention; the batch for a model, of some of the three rows)
FAMILIES = {
    "llava": (partial(tiny.tiny_llava, kv_heads=2), llava),
    "llava_llama": (original, Original),
    **{
        kind: (partial(tiny_llava_family.tiny, kind), partial(llava_family, TILED if kind == "llava_next" else FRAMED))
        for kind in tiny_llava_family.CLASSES
    },
    **{kind: (partial(tiny_qwen.tiny_qwen, kind), partial(qwen, kind)) for kind in tiny_qwen.KINDS},
    "internvl": (tiny_internvl.tiny_internvl, internvl),
    **{
        kind: (partial(tiny_others.tiny, kind), partial(other, kind, MISTRAL if kind == "mistral3" else IDEFICS))
        for kind in tiny_others.KINDS
    },
}


def make(family, dtype=torch.float64, which=(0, 1, 2), **options):
    """The family's model and a batch of some of its rows: 0 has one image or video (or both), 1 several, 2 none."""
    build, scene = FAMILIES[family]
    # the model that is handed out has not run: transformers' hooks of a first run do not pickle
    return build(dtype=dtype, **options), scene(build(dtype=dtype, **options), which)
