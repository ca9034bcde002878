"""The method a second time, from METHOD and paper, one sample at a time: loops, full matrices, no cache, no masks.

Nothing of lp_patch is imported here. Tokens are really taken out of Python lists; every layer is written out on the
model's own weights. Slow, and plain enough to be checked by eye.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class Expected:
    logits: torch.Tensor  # (S, vocab), length of the input
    stage1: list[int]
    stage2: list[int]
    hidden: list[torch.Tensor]  # per layer boundary, (S, C), length of the input
    scores1: list[float] | None
    scores2: dict[int, float]


def budget(n, layers, k, ratio, tokens=None, share=2 / 9, wipe=None):
    average = tokens if tokens is not None else share * n
    if average >= n:
        return n, n
    r2 = math.ceil(layers * average / (ratio * k + (wipe or layers) - k) - 1e-9)
    return min(round(ratio * r2), n), min(r2, n)


def farthest(features, seeds, count):
    """Plain greedy selection on a list of vectors."""
    unit = [f / max(f.norm().item(), 1e-12) for f in features]
    similarity = [[float(a @ b) for b in unit] for a in unit]
    chosen = list(seeds)
    while len(chosen) < len(seeds) + count:
        best, best_value = None, None
        for i in range(len(unit)):
            if i in chosen:
                continue
            against = chosen or [j for j in range(len(unit)) if j != i]
            value = max(similarity[i][j] for j in against)
            if best is None or value < best_value - 1e-12:
                best, best_value = i, value
        chosen.append(best)
    return chosen


def vision_features(model, pixels):
    """(n, N, C) features before the projector, (n, N) [CLS] attention of the layer they come from."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    states = tower(pixels, output_hidden_states=True).hidden_states
    layer = tower.encoder.layers[model.config.vision_feature_layer]
    x = layer.layer_norm1(states[model.config.vision_feature_layer - 1])
    heads = tower.config.num_attention_heads
    cls = []
    for image in x:
        q = layer.self_attn.q_proj(image[:1]).view(1, heads, -1).transpose(0, 1)
        k = layer.self_attn.k_proj(image).view(image.shape[0], heads, -1).transpose(0, 1)
        attention = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        cls.append(attention.mean(0)[0, 1:])
    return states[model.config.vision_feature_layer][:, 1:], torch.stack(cls)


def rotate(x, positions, theta):
    """Rotary embedding of x (H, S, D) at integer positions."""
    half = x.shape[-1] // 2
    frequency = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=x.dtype)
    angle = torch.tensor(positions, dtype=x.dtype)[:, None] * frequency
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def attention_layer(model, layer, x, positions):
    """One decoder layer on x (S, C); returns its output and the attention map (H, S, S)."""
    c = model.config.text_config
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    y = layer.input_layernorm(x)

    def split(linear, count):
        return linear(y).view(len(y), count, -1).transpose(0, 1)

    theta = c.rope_parameters["rope_theta"] if hasattr(c, "rope_parameters") else c.rope_theta
    q = rotate(split(layer.self_attn.q_proj, heads), positions, theta)
    k = rotate(split(layer.self_attn.k_proj, kv_heads), positions, theta).repeat_interleave(heads // kv_heads, 0)
    v = split(layer.self_attn.v_proj, kv_heads).repeat_interleave(heads // kv_heads, 0)
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    for i in range(len(y)):
        logits[:, i, i + 1 :] = -torch.inf
    attention = logits.softmax(-1)
    x = x + layer.self_attn.o_proj((attention @ v).transpose(0, 1).reshape(len(y), -1))
    return x + layer.mlp(layer.post_attention_layernorm(x)), attention


@torch.no_grad()
def expected(
    model, ids, pixels, *, scorer="diversity", tokens=None, ratio=2 / 9, layer=None, stage_ratio=3.0, diversity=0.1,
    wipe=None, positions="original", pruner=None, turns=None,
):  # fmt: skip
    """What one unpadded sample must give.

    `turns`: ends of the prompts that were prefilled one after the other; ids between or after them were generated, or
    are later text, and choose nothing. By default all ids are one prompt.
    """
    text = model.config.text_config
    n_layers = text.num_hidden_layers
    k = layer or round(0.375 * n_layers)
    turns = turns or [len(ids)]
    visual = [i for i in range(turns[-1]) if ids[i] == model.config.image_token_id]
    x = model.get_input_embeddings()(torch.tensor(ids))
    stage1, scores1, r2_of, n = [], [], 0, 0
    if visual:
        features, cls = vision_features(model, pixels)
        n = features.shape[1]
        r1, r2_of = budget(n, n_layers, k, stage_ratio, tokens, ratio, wipe)
        for image in range(len(features)):
            if r1 >= n:
                kept = list(range(n))
            elif scorer == "diversity":
                kept = farthest(features[image], [], r1)
            else:
                if scorer == "cls":
                    score = cls[image]
                else:
                    score = pruner(features[image].to(next(pruner.parameters()).dtype)).softmax(-1)[:, 1]
                scores1 += score.tolist()
                d = round(diversity * r1)
                order = sorted(range(n), key=lambda i, s=score: (-float(s[i]), i))
                kept = farthest(features[image], order[: r1 - d], d)
            stage1 += [image * n + i for i in sorted(kept)]
        projected = model.model.multi_modal_projector(features).flatten(0, 1)
        for index, position in enumerate(visual):
            x[position] = projected[index]

    removed = set(visual) - {visual[i] for i in stage1}
    at = [i for i in range(len(ids)) if i not in removed]  # original index of each token that is left
    x = x[at]
    where = at if positions == "original" else list(range(len(at)))

    def back(x, at):
        rows, slot = [], 0
        for i in range(len(ids)):
            # a forward cannot hand back what an earlier one computed: its first token answers for those before it
            start = max([end for end in [0, *turns] if end <= i])
            while slot + 1 < len(at) and (at[slot + 1] <= i or at[slot] < start):
                slot += 1
            rows.append(x[slot])
        return torch.stack(rows)

    hidden, scores2 = [back(x, at)], {}
    for number in range(1, n_layers + 1):
        x, attention = attention_layer(model, model.model.language_model.layers[number - 1], x, where)
        hidden.append(back(x, at))
        drop = set()
        left = [i for i in visual if i in at]
        if number == k and stage_ratio > 1:
            for start, end in zip([0, *turns], turns, strict=False):
                own = [i for i in left if start <= i < end]
                wanted = r2_of * (len([i for i in visual if start <= i < end]) // n if n else 0)
                if len(own) <= wanted:
                    continue
                last = max(i for i in visual if start <= i < end)
                queries = [i for i in range(last + 1, end)] or [max(i for i in at if i < end)]
                mean = attention.mean(0)[[at.index(i) for i in queries]].mean(0)
                scores2 |= {visual.index(i): float(mean[at.index(i)]) for i in own}
                best = sorted(own, key=lambda i: (-scores2[visual.index(i)], i))[:wanted]
                drop |= set(own) - set(best)
        if number == wipe and wipe < n_layers and r2_of < n:
            drop = set(left)
        if drop and number != wipe:
            stage2_left = [i for i in left if i not in drop]
        elif number == k:
            stage2_left = left
        if drop:
            keep = [s for s, i in enumerate(at) if i not in drop]
            at, where, x = [at[s] for s in keep], [where[s] for s in keep], x[keep]
    final = back(model.model.language_model.norm(x), at)
    hidden[-1] = final
    return Expected(
        model.lm_head(final), stage1, [visual.index(i) for i in stage2_left], hidden, scores1 or None, scores2
    )


@torch.no_grad()
def generated(model, ids, pixels, count, **options):
    """Greedy decoding, everything computed anew for every token."""
    ids, turns = list(ids), options.pop("turns", [len(ids)])
    start = len(ids)
    for _ in range(count):
        ids.append(int(expected(model, ids, pixels, turns=turns, **options).logits[-1].argmax()))
    return ids[start:]
