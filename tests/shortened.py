"""The method for models whose layers keep a state instead of keys: rows really shortened, one by one.

Hiding a token from attention does not hide it from a recurrence, so `tests/masked.py` is no oracle there. Here each
row runs alone, without padding and cache, and loses its tokens where they vanish; masks are the untouched model's for
the whole row, of which rows and columns are taken. Nothing of lp_patch is imported. Arguments are those of `masked`.
"""

from contextlib import ExitStack

import torch


@torch.no_grad()
def masked_logits(model, layers, inputs, hidden=(), end=None):
    """(B, S, vocab) of the tokens that are left in the end, zero elsewhere."""
    logits = None
    for row, positions, states, _ in _rows(model, layers, inputs, hidden):
        found = model.get_output_embeddings()(states)
        if logits is None:
            logits = found.new_zeros(*inputs["input_ids"].shape, found.shape[-1])
        logits[row, positions] = found
    return logits


@torch.no_grad()
def attention_map(model, layers, inputs, hidden, index, attention="self_attn", end=None):
    """(B, H, S, S) of decoder layer `index`, after the softmax; zero at tokens that are gone."""
    maps = None
    length = inputs["input_ids"].shape[1]
    for row, positions, _, found in _rows(model, layers, inputs, hidden, index, attention):
        if maps is None:
            maps = found.new_zeros(inputs["input_ids"].shape[0], found.shape[0], length, length)
        maps[row][:, positions[:, None], positions] = found
    return maps


def _rows(model, layers, inputs, hidden, index=None, attention="self_attn"):
    """Each row's number, the positions of what is left, their last states (N, C), and the map of layer `index`."""
    decoder, given = model.get_decoder(), {}
    handle = decoder.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    model(**inputs, use_cache=False)
    handle.remove()
    embeds, ids = given["inputs_embeds"], given.get("position_ids")
    real = torch.ones(embeds.shape[:2], dtype=torch.bool)
    if inputs.get("attention_mask") is not None:
        real = inputs["attention_mask"].bool()
    before = decoder.config._attn_implementation
    for row in range(len(embeds)):
        there = real[row].nonzero().flatten()
        own = {"inputs_embeds": embeds[row, there][None], "use_cache": False}
        if ids is not None:
            own["position_ids"] = ids.expand(*ids.shape[:-2], len(embeds), -1)[..., row : row + 1, there]
        model.set_attn_implementation("eager")
        whole = []
        with ExitStack() as stack:
            for layer in layers:
                hook = layer.register_forward_pre_hook(
                    lambda module, args, kwargs, into=whole: into.append(kwargs["attention_mask"]), with_kwargs=True
                )
                stack.callback(hook.remove)
            decoder(**own)
        model.set_attn_implementation(before if index is None else "eager")
        keep = []
        for number in range(len(layers)):
            left = torch.ones(len(there), dtype=torch.bool)
            for start, gone in hidden:
                if start <= number:
                    left &= ~gone[row, there]
            keep.append(left.nonzero().flatten())
        found = []
        with ExitStack() as stack:
            for number, layer in enumerate(layers):
                hook = layer.register_forward_pre_hook(
                    _shorten(keep, number, whole[number], len(there)), with_kwargs=True
                )
                stack.callback(hook.remove)
            if index is not None:
                module = layers[index].get_submodule(attention)
                stack.callback(module.register_forward_hook(lambda *call, into=found: into.append(call[-1][1])).remove)
            states = decoder(**own).last_hidden_state[0]
        model.set_attn_implementation(before)
        if index is None:
            yield row, there[keep[-1]], states, None
        else:
            yield row, there[keep[index]], None, found[0][0]


def _shorten(keep, number, mask, length):
    """A hook that gives layer `number` the tokens `keep[number]` of the row's `length`."""
    here = keep[number]
    before = keep[number - 1] if number else torch.arange(length)
    left = torch.isin(before, here)

    def hook(module, args, kwargs):
        kwargs = dict(kwargs)
        if kwargs.get("position_embeddings") is not None:  # some layers take none
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = cos[:, here], sin[:, here]
        if mask is not None and mask.dim() == 4:
            kwargs["attention_mask"] = mask[:, :, here][..., here]
        return (args[0][:, left], *args[1:]), kwargs

    return hook
