"""Random prompts, paddings, image counts, budgets, layers and cache modes against the oracle.

The long tier (`make test-long`) draws 500 examples anew and prints the seed of a failure.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import expected
from tiny import CACHE, N, batch, images, tiny_llava, tokens

import lp_patch

MODELS = {heads: tiny_llava(seed=50 + heads, kv_heads=heads) for heads in (4, 2, 1)}

# a prompt has some text; where its last image ends it, the last token asks
row = st.lists(st.one_of(st.integers(1, 6), st.just("image")), min_size=1, max_size=4).filter(
    lambda x: set(x) != {"image"}
)
rows = st.lists(row, min_size=1, max_size=3)
options = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, N + 4),
        "layer": st.integers(1, 4),
        "stage_ratio": st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0]),
        "scorer": st.sampled_from(["diversity", "cls"]),
        "diversity": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        "positions": st.sampled_from(["original", "compact"]),
        "wipe": st.sampled_from([None, 5, 6]),
    }
)


@settings(max_examples=500 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 40)
@given(
    rows=rows,
    options=options,
    heads=st.sampled_from([4, 2, 1]),
    side=st.sampled_from(["left", "right"]),
    cache=st.sampled_from(["none", "made", "given"]),
    steps=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_against_the_oracle(rows, options, heads, side, cache, steps, seed):
    from transformers import DynamicCache

    model = MODELS[heads]
    prompts = [tokens(*row, seed=seed + i) for i, row in enumerate(rows)]
    counts = [row.count("image") for row in rows]
    pixels = images(sum(counts), seed=seed) if sum(counts) else None
    own = [images(0)] * len(rows) if pixels is None else pixels.split(counts)
    ours = {("final_wipe_layer" if name == "wipe" else name): value for name, value in options.items()}
    new = [tokens(1, seed=seed + 99 + step) * len(rows) for step in range(steps if cache != "none" else 0)]
    inputs = batch(prompts, pixels, side)
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    extra = {"use_cache": cache != "none"} | ({CACHE: DynamicCache()} if cache == "given" else {})
    with lp_patch.applied(model, **ours) as patch, torch.no_grad():
        out = model(**inputs, **extra)
        got = [[out.logits[i][mask[i].bool()]] for i in range(len(rows))]
        trace, seen = patch.trace, mask
        for column in new:
            seen = torch.cat([seen, torch.ones(len(rows), 1, dtype=torch.long)], 1)
            out = model(
                input_ids=torch.tensor([[token] for token in column]),
                attention_mask=seen,
                position_ids=(seen.cumsum(-1) - 1)[:, -1:],
                **{CACHE: out[CACHE]},
            )
            for i in range(len(rows)):
                got[i].append(out.logits[i])
    for i, prompt in enumerate(prompts):
        ids = prompt + [column[i] for column in new]
        want = expected(model, ids, own[i], turns=[len(prompt)], **options)
        assert (trace.stage1[i].tolist(), trace.stage2[i].tolist()) == (want.stage1, want.stage2)
        torch.testing.assert_close(torch.cat(got[i]), want.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_a_thousand_generations_keep_memory_flat():
    import resource

    model = tiny_llava(seed=60, dtype=torch.float32)
    inputs = [
        batch([tokens(3, "image", 9)], images(1, dtype=torch.float32)),
        batch([tokens(5), tokens("image", 4, "image", 2)], images(2, dtype=torch.float32)),
    ]
    with lp_patch.applied(model, tokens=5):
        peaks = []
        for i in range(1000):
            model.generate(**inputs[i % 2], max_new_tokens=2, do_sample=False)
            if i in (199, 999):
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[1] - peaks[0] < 8 * 1024, f"{(peaks[1] - peaks[0]) / 1024:.1f} MiB more after 800 generations"
