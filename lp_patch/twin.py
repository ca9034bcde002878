"""A tiny random model of the same class as a given one, to try things on: its config with everything made small.

The vision side is there, without memory, and never runs: the method that encodes images answers with random features.
"""

import inspect
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compat import merging_module
from .registry import Adapter

VOCABULARY, FIRST_WORD = 256, 100  # ids below FIRST_WORD are special
MOST_LAYERS = 8

# what a text config says of sizes, by name, and what it becomes; heads keep their width, on which rotary axes depend
SMALL = {
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_nextn_predict_layers": 0,
}
AT_MOST = {"num_experts_per_tok": 2, "top_k_experts": 2, "moe_k": 2, "first_k_dense_replace": 1}
DEPTHS = ("num_hidden_layers", "depth", "num_layers", "n_layers")


@dataclass
class Batch:
    """Prompts for a twin: rows of one, two and no pictures, padded on the left.

    Attributes:
        inputs: arguments of a forward.
        features: what the encoder answers, (N, C) a picture.
        visual: (B, S) bool.
    """

    inputs: dict[str, Any]
    features: list[Tensor]
    visual: Tensor


def make_twin(model: Any, adapter: Adapter, seed: int = 0) -> Any:
    """A random model of this one's class and structure, in float64 on the CPU.

    Args:
        model: unwrapped.
        adapter: says which config fields hold the placeholders' ids.
    """
    config = deepcopy(model.config)
    text = config.get_text_config()
    _shrink_text(text)
    for sub in _parts(config):
        if sub is not text and sub is not config:
            for name in DEPTHS:
                if isinstance(getattr(sub, name, None), int):
                    setattr(sub, name, 1)
    for sub in _parts(config):
        sub._attn_implementation = "eager"  # which all can; `check` chooses for the language model
    _renumber(config, [m.placeholder for m in adapter.modalities if isinstance(m.placeholder, str)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("meta"):
            twin = type(model)(config).eval()
        base = merging_module(twin) if adapter.merge is None else twin
        path, _, name = adapter.language_model.rpartition(".")
        language = getattr(base.get_submodule(path), name)
        language = type(language)(language.config).double().eval()
        setattr(base.get_submodule(path), name, language)
        for module in twin.modules():
            _fill(module, random=module in (base, twin.get_output_embeddings()))
        with torch.no_grad():
            for name, weight in language.named_parameters():
                if "embed" in name:
                    weight.normal_(0, 1.0)
                elif weight.dim() > 1:
                    weight.normal_(0, 1.2 * weight.shape[-1] ** -0.5)
    if hasattr(twin, "set_experts_implementation") and any("experts" in name for name, _ in twin.named_modules()):
        twin.set_experts_implementation("eager")  # the default computes in no float64
    if getattr(twin, "generation_config", None) is not None:
        twin.generation_config.eos_token_id = None  # random models must not stop at random
        twin.generation_config.pad_token_id = 0
        twin.generation_config.suppress_tokens = list(range(FIRST_WORD))  # nor speak of pictures
    return twin


def _fill(module: nn.Module, random: bool) -> None:
    """Give a module's own weights that lie nowhere a place: random numbers, or zeros that take no memory."""
    given: list[Any] = [module._parameters, module._buffers]
    for own in given:
        for name, x in own.items():
            if x is not None and x.device.type == "meta":
                dtype = torch.float64 if x.is_floating_point() else x.dtype
                filled = torch.zeros((), dtype=dtype).expand(x.shape)
                if random and x.is_floating_point():
                    filled = torch.randn(x.shape, dtype=dtype) * max(1, x.shape[-1]) ** -0.5
                own[name] = nn.Parameter(filled, requires_grad=False) if own is module._parameters else filled


def make_batch(
    twin: Any, placeholder: int, sizes: tuple[tuple[int, ...], ...], width: int, only: int | None = None
) -> Batch:
    """Prompts with pictures of these sizes, row by row; text stands before, between and after them.

    Args:
        only: one row alone, with the tokens and features that it has among the others; None: all.
    """
    generator = torch.Generator().manual_seed(0)
    rows, features = [], []
    for number, pictures in enumerate(sizes):
        ids = _words(generator, 3)
        for size in pictures:
            feature = torch.randn(size, width, generator=generator, dtype=torch.float64)
            if only in (None, number):
                features.append(feature.to(twin.dtype))
            ids += [placeholder] * size + _words(generator, 4)
        rows.append(ids + _words(generator, 3))
    rows = rows if only is None else [rows[only]]
    length = max(map(len, rows))
    padded, mask = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        padded[i, length - len(row) :], mask[i, length - len(row) :] = torch.tensor(row), 1
    inputs: dict[str, Any] = {"input_ids": padded, "attention_mask": mask}
    for name in inspect.signature(twin.forward).parameters:
        if name.endswith("token_type_ids"):  # what some models tell visual tokens by, or route them
            inputs[name] = (padded == placeholder).int()
    if features:
        inputs["pixel_values"] = torch.zeros(len(features), 3, 2, 2, dtype=twin.dtype)
    return Batch(inputs, features, padded == placeholder)


@dataclass
class Encoded(BaseModelOutputWithPooling):
    """What an `Encoder` answers; a ModelOutput, as encoders return one."""

    deepstack_features: Any = None


class Encoder:
    """Stands in for a method that encodes pictures.

    Attributes:
        features: what it answers, (N, C) each.
        stacked: whether it answers with one tensor (F, N, C), as some merging modules want it.
        deepstack: how many of the first decoder layers add features too.
    """

    def __init__(self, method: Any, deepstack: int) -> None:
        self.features: list[Tensor] = []
        self.stacked, self.deepstack = False, deepstack
        # generate() chooses arguments by it; none of them is needed here
        own = [p.replace(default=None) if p.default is p.empty and p.kind < p.VAR_POSITIONAL else p
               for p in inspect.signature(method).parameters.values()]  # fmt: skip
        self.__signature__ = inspect.Signature(own)

    def __call__(self, *args: Any, **kwargs: Any) -> Encoded:
        found: Any = torch.stack(self.features) if self.stacked else [x.clone() for x in self.features]
        return Encoded(pooler_output=found, deepstack_features=[self.features] * self.deepstack)


def stand_in(base: Any, method: str) -> Encoder:
    """Put an `Encoder` in the place of a method of the merging module."""
    layers = getattr(getattr(base.config, "vision_config", None), "deepstack_visual_indexes", None)
    encoder = Encoder(getattr(base, method), len(layers or ()))
    setattr(base, method, encoder)
    return encoder


def _words(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=generator).tolist()


def _parts(config: Any) -> Iterator[Any]:
    """A config and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}) or {}:
        sub = getattr(config, name, None)
        if sub is not None and hasattr(sub, "to_dict"):
            yield from _parts(sub)


def _shrink_text(text: Any) -> None:
    """Make a language model's config small, and keep its pattern of layers."""
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    groups = heads // (getattr(text, "num_key_value_heads", None) or heads)
    count = text.num_hidden_layers
    fewer = min(count, MOST_LAYERS)
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == count:  # a value for each layer
            setattr(text, name, type(value)(value[:fewer]))
    text.num_hidden_layers = fewer
    small = {"num_attention_heads": 2, "num_key_value_heads": 2 if groups == 1 else 1}
    small["hidden_size"] = small["num_attention_heads"] * head_dim
    small["head_dim"] = head_dim
    for name, value in (small | SMALL).items():
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, value)
    for name, value in AT_MOST.items():
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(value, getattr(text, name)))


def _renumber(config: Any, placeholders: list[str]) -> None:
    """Give every special token an id that the small vocabulary holds, equal ones the same."""
    given: dict[int, int] = {}
    for sub in _parts(config):
        for name in sorted({*(x for x in vars(sub) if x.endswith(("_token_id", "_token_index"))), *placeholders}):
            value = getattr(sub, name, None)
            if isinstance(value, int) and value >= 0:
                setattr(sub, name, given.setdefault(value, len(given) + 1))
