"""The method a second time, for any family: the untouched model, whose decoder layers are told what not to see.

Nothing of lp_patch is imported here. Removed tokens stay in the sequence and are hidden as keys from the layer on that
must not see them: attention then gives every other token what it would give if they were gone. Rows of removed and
padding tokens hold numbers that mean nothing (each sees at least itself).

    inputs    keyword arguments of the model's forward: input_ids (B, S), attention_mask, pixel values, ...
    layers    the decoder layers, in order
    hidden    [(index, gone)]: tokens `gone` (B, S) bool vanish before decoder layer `index`, counted from 0
    visual    rows -> visual inputs -> the positions (ascending) of its counted tokens in the prompt
"""

import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from oracle import budget, farthest


@dataclass
class Expected:
    """What a batch must give. Sets are numbered among each row's counted visual tokens, in sequence order."""

    logits: torch.Tensor  # (B, S, vocab)
    stage1: list[list[int]]
    stage2: list[list[int]]
    scores1: list[list[float]]
    scores2: list[dict[int, float]]
    left: torch.Tensor  # (B, S) bool: tokens that are still there in the last layer
    hidden: list[tuple[int, torch.Tensor]]  # what vanished, and when


@torch.no_grad()
def stock_masks(model, layers, inputs):
    """What the untouched model lets each layer see, (B, 1, S, S) bool; None where that is all before it."""
    found, before = [], model.get_decoder().config._attn_implementation
    model.set_attn_implementation("eager")
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.register_forward_pre_hook(
                lambda module, args, kwargs: found.append(kwargs["attention_mask"]), with_kwargs=True
            )
            stack.callback(hook.remove)
        model(**inputs, use_cache=False)
    model.set_attn_implementation(before)
    return [None if x is None else x if x.dtype == torch.bool else x > torch.finfo(x.dtype).min / 2 for x in found]


def masks(inputs, hidden, stock, dtype, end=None):
    """The additive mask (B, 1, S, S) of each layer: what it sees, and what is hidden from that layer on.

    `stock`: what each layer sees of the whole prompt; None: all before it, without padding. Tokens from `end` on came
    later: those before it have not seen them, and they see no later ones, whatever the prompt sees of itself.
    """
    batch, length = inputs["input_ids"].shape
    real = torch.ones(batch, length, dtype=torch.bool)
    if inputs.get("attention_mask") is not None:
        real = inputs["attention_mask"].bool()
    causal, itself = torch.ones(length, length).tril().bool(), torch.eye(length).bool()
    late = torch.zeros(length, dtype=torch.bool) if end is None else torch.arange(length) >= end
    causal_late = ~late[:, None] & ~late | causal
    out = []
    for layer, own in enumerate(stock):
        seen = real
        for start, gone in hidden:
            if start <= layer:
                seen = seen & ~gone
        allowed = ((causal if own is None else own[:, 0] & causal_late) & seen[:, None, :]) | itself
        out.append(torch.zeros(batch, 1, length, length, dtype=dtype).masked_fill(~allowed[:, None], -torch.inf))
    return out


@contextmanager
def hiding(model, layers, inputs, hidden, end=None, stock=None):
    """Within the block, the layers use our masks."""
    stock = stock_masks(model, layers, inputs) if stock is None else stock
    own = masks(inputs, hidden, stock, model.dtype, end)

    def replace(mask):
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask})

    with ExitStack() as stack:
        for layer, mask in zip(layers, own, strict=True):
            handle = layer.register_forward_pre_hook(replace(mask), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def masked_logits(model, layers, inputs, hidden=(), end=None, stock=None):
    """(B, S, vocab) of the untouched model."""
    with hiding(model, layers, inputs, hidden, end, stock):
        return model(**inputs, use_cache=False).logits


@torch.no_grad()
def attention_map(model, layers, inputs, hidden, index, attention="self_attn", end=None, stock=None):
    """(B, H, S, S) of decoder layer `index`, after the softmax. Runs eagerly, whatever the model runs with."""
    found = []
    before = model.get_decoder().config._attn_implementation  # some wholes do not follow their parts
    handle = layers[index].get_submodule(attention).register_forward_hook(lambda *call: found.append(call[-1][1]))
    try:
        model.set_attn_implementation("eager")
        masked_logits(model, layers, inputs, hidden, end, stock)
    finally:
        handle.remove()
        model.set_attn_implementation(before)
    return found[-1]


@torch.no_grad()
def merged(model, language_model, inputs):
    """(B, S, C): what the language model is given, text embeddings and projected visual features."""
    found = []
    handle = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs, use_cache=False)
    handle.remove()
    return found[-1]


def best(scores, count):
    """The `count` largest, ties to the first."""
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:count]


def chosen_before(features, count, scores, diversity):
    """Stage 1 of one visual input (n, C): indices, ascending."""
    if count >= len(features):
        return list(range(len(features)))
    if scores is None:
        return sorted(farthest(list(features), [], count))
    diverse = round(diversity * count)
    return sorted(farthest(list(features), best(scores, count - diverse), diverse))


def chosen_inside(maps, row, positions, last_visual, there, end, structural, count):
    """Stage 2 of one row: positions that stay, and the score of each candidate.

    `maps` (B, H, S, S); the queries are text after the last visual token and before `end`, without such the last token
    that is still there.
    """
    tokens = [i for i in range(end) if there[row, i]]
    queries = [i for i in tokens if i > last_visual and i not in structural] or tokens[-1:]
    mean = maps[row].double().mean(0)[queries].mean(0)
    scores = {i: float(mean[i]) for i in positions}
    return sorted(sorted(positions, key=lambda i: (-scores[i], i))[:count]), scores


@torch.no_grad()
def expected(
    model, layers, language_model, inputs, visual, *, tokens=None, ratio=2 / 9, layer=None, stage_ratio=3.0,
    diversity=0.1, wipe=None, pruner=None, features=None, structural=None, end=None, attention="self_attn",
    positions="original", earlier=(), run=None,
):  # fmt: skip
    """What a batch must give; options as `oracle.expected` has them.

    `features`: rows -> visual inputs -> (n, C) that stage 1 looks at; by default what the language model is given.
    `structural`: rows -> positions that are neither counted nor text. `end`: where the prompt ended, if tokens that
    were generated (or a later text turn) follow; they choose nothing. `earlier`: the `hidden` of an earlier turn, whose
    pictures choose no more; `visual` has those of this turn. `run`: a module with `masked_logits` and `attention_map`
    for models on which nothing can be hidden; None: this one.
    """
    given = {"stock": stock_masks(model, layers, inputs)} if run is None else {}
    run = sys.modules[__name__] if run is None else run
    n_layers = len(layers)
    k = layer or min(max(round(0.375 * n_layers), 1), n_layers - 1)
    batch, length = inputs["input_ids"].shape
    end = length if end is None else end
    real = torch.ones(batch, length, dtype=torch.bool)
    if inputs.get("attention_mask") is not None:
        real = inputs["attention_mask"].bool()
    structural = structural or [[] for _ in range(batch)]
    embeds = merged(model, language_model, inputs)

    first = torch.zeros(batch, length, dtype=torch.bool)
    kept, scores1, budgets = [], [], []
    for row, own in enumerate(visual):
        budgets.append([budget(len(x), n_layers, k, stage_ratio, tokens, ratio, wipe) for x in own])
        kept.append([])
        scores1.append([])
        for number, (at, (r1, _)) in enumerate(zip(own, budgets[-1], strict=True)):
            seen, scores = embeds[row, at] if features is None else features[row][number], None
            if pruner is not None and r1 < len(at):
                scores = pruner(seen.to(next(pruner.parameters()).dtype)).softmax(-1)[:, 1]
                scores1[-1] += scores.tolist()
            stay = [at[i] for i in chosen_before(seen, r1, scores, diversity)]
            first[row, list(set(at) - set(stay))] = True
            kept[-1] += stay
        kept[-1].sort()

    if positions == "compact":
        # places of removed tokens are taken; ids of several axes have no such thing
        inputs = {**inputs, "position_ids": ((real & ~first).cumsum(dim=1) - 1).clamp(min=0)}
    second, third = torch.zeros_like(first), torch.zeros_like(first)
    stay2, scores2 = [], []
    maps = None
    if stage_ratio > 1 and any(sum(r2 for _, r2 in b) < len(x) for b, x in zip(budgets, kept, strict=True)):
        maps = run.attention_map(model, layers, inputs, [*earlier, (0, first)], k - 1, attention, end, **given)
    for row, own in enumerate(visual):
        wanted = sum(r2 for _, r2 in budgets[row])
        stay, scores = kept[row], {}
        if maps is not None and wanted < len(kept[row]):
            last = max(max(x) for x in own)
            stay, scores = chosen_inside(maps, row, kept[row], last, real & ~first, end, structural[row], wanted)
        stay2.append(stay)
        scores2.append(scores)
        second[row, list(set(kept[row]) - set(stay))] = True
        pruned = any(r2 < len(x) for x, (_, r2) in zip(own, budgets[row], strict=True))
        if wipe is not None and wipe < n_layers and pruned:
            third[row, stay] = True

    hidden = [*earlier, (0, first), (k, second), (n_layers if wipe is None else wipe, third)]
    gone = torch.stack([gone for _, gone in hidden]).any(dim=0)
    numbers = [{p: i for i, p in enumerate(sorted(p for x in own for p in x))} for own in visual]
    return Expected(
        run.masked_logits(model, layers, inputs, hidden, end, **given),
        [[n[p] for p in x] for n, x in zip(numbers, kept, strict=True)],
        [[n[p] for p in x] for n, x in zip(numbers, stay2, strict=True)],
        scores1,
        [{n[p]: s for p, s in x.items()} for n, x in zip(numbers, scores2, strict=True)],
        real & ~gone,
        hidden,
    )
