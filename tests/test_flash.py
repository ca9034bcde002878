"""transformers' own FlashAttention path, from the model's call to the kernel, over kernels of plain PyTorch.

`flash_attn` has none for the CPU. All that transformers does around it runs as it is: the name in the config, the
loading by that name, unpadding, the search for packed sequences, the functions' signatures.
"""

import pytest
import torch
import transformers.modeling_flash_attention_utils as fa
from families import make
from test_layers import windowed
from tiny import V5
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

from lp_patch import UnsupportedInputError, applied

OPTIONS = {"tokens": 4, "layer": 2}
CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
FAMILIES = ["llava", "qwen2_5_vl", "internvl", "mistral3"]
NEW = 3
HUB = "kernels-community/flash-attn2"  # what transformers registers for a kernel of the Hub
pytestmark = pytest.mark.skipif(not V5, reason="transformers 4 loads the package's functions otherwise")


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
):
    """As the package's: q (B, N, H, D), k and v (B, P + N, KV, D), the causal mask aligned at its end."""
    assert q.dim() == k.dim() == 4 and len(q) == len(k) and window_size == (-1, -1)
    mask = None
    if causal:
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, deterministic=False, block_table=None,
):  # fmt: skip
    """As the package's: sequences one after the other in q (T, H, D), k and v (U, KV, D)."""
    assert int(max_seqlen_q) == int(cu_seqlens_q.diff().max()) and int(max_seqlen_k) == int(cu_seqlens_k.diff().max())
    sizes = [x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
    rows = zip(q.split(sizes[0]), k.split(sizes[1]), v.split(sizes[1]), strict=True)
    own = {"softmax_scale": softmax_scale, "causal": causal}
    return torch.cat([flash_attn_func(*(x[None] for x in row), **own)[0] for row in rows])


@pytest.fixture
def loaded(monkeypatch):
    """By which names transformers loads FlashAttention, which calls our kernels."""
    names = []

    def load(implementation, *args, **kwargs):
        names.append(implementation)
        kernels = [flash_attn_func, flash_attn_varlen_func]
        kernels += [None] if hasattr(fa, "_flash_with_kvcache_fn") else []
        return *kernels, fa._pad_input, fa._unpad_input

    monkeypatch.setattr(fa, "_lazy_imports", load)
    monkeypatch.setattr(fa, "_loaded_implementation", None)
    # whether the package is there, and a GPU
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, *_, **__: name)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda self, *_, **__: True)
    # as transformers does when it has fetched a kernel
    AttentionInterface.register(HUB, flash_attention_forward)
    AttentionMaskInterface.register(HUB, flash_attention_mask)
    yield names
    AttentionInterface._global_mapping.pop(HUB)
    AttentionMaskInterface._global_mapping.pop(HUB)


@torch.no_grad()
def forward(model, scene, **more):
    return model(**scene.forward(), **more).logits


def generate(model, scene):
    out = model.generate(
        **scene.inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences[:, -NEW:], torch.stack(out.logits, dim=1)


def flash(model, name="flash_attention_2"):
    """The model with another back-end, its tower's too."""
    model.set_attn_implementation(name)
    assert model.get_decoder().config._attn_implementation == name
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", [(0,), (0, 1, 2)], ids=["alone", "padded"])
def test_pruned(family, which, loaded):
    model, scene = make(family, which=which, seed=50)
    model.generation_config.suppress_tokens = [0, 1, 2, 3, 4, 5, 6]
    plain, want = forward(model, scene), scene.want(model, **OPTIONS)
    flash(model)
    with applied(model, **OPTIONS) as patch:
        logits, (new, steps) = forward(model, scene), generate(model, scene)
    assert set(loaded) == {"flash_attention_2"}
    assert [x.tolist() for x in patch.trace.stage2] == want.stage2
    torch.testing.assert_close(logits[want.left], want.logits[want.left], **CLOSE)
    assert not torch.allclose(logits[want.left], plain[want.left], atol=0.1)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(steps, scene.want(model, new, **OPTIONS).logits[:, -NEW - 1 : -1], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", [(0,), (2,), (0, 1, 2)], ids=["alone", "text", "padded"])
def test_full_budget_and_text_alone_are_untouched_bit_for_bit(family, which, loaded):
    model, scene = make(family, torch.float32, which=which, seed=51)
    flash(model)
    plain = forward(model, scene), generate(model, scene)
    for options in [{"ratio": 1.0}, OPTIONS] if which == (2,) else [{"ratio": 1.0}]:
        with applied(model, **options):
            found = forward(model, scene), generate(model, scene)
        torch.testing.assert_close(found, plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["flash_attention_3", "flash_attention_4", HUB])
def test_other_names_chosen_under_the_patch(name, loaded):
    model, scene = make("llava", which=(0, 1, 2), seed=52)
    want = scene.want(model, **OPTIONS)
    with applied(model, **OPTIONS):
        torch.testing.assert_close(forward(model, scene)[want.left], want.logits[want.left], **CLOSE)
        assert not loaded
        flash(model, name)
        torch.testing.assert_close(forward(model, scene)[want.left], want.logits[want.left], **CLOSE)
        assert set(loaded) == {name}
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(forward(model, scene)[want.left], want.logits[want.left], **CLOSE)
    assert set(loaded) == {name}


def test_half_precision_and_float32_norms(loaded):
    """transformers reads the module's own weights to find the dtype that FlashAttention is to be given."""
    model, scene = make("llava", torch.float32, which=(0, 1, 2), seed=53)
    want = scene.want(model, **OPTIONS)
    flash(model)
    with applied(model, **OPTIONS):
        found = forward(model, scene)
        with torch.autocast("cpu", torch.bfloat16):
            half = forward(model, scene)
    torch.testing.assert_close(found[want.left], want.logits[want.left], **CLOSE)
    assert half.isfinite().all()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "mistral3"])  # LLaVA hands them to its tower too
def test_bounds_of_packed_sequences(family, loaded):
    """A caller's own bounds: passed on where nothing is removed, else refused: they bound other tokens."""
    model, scene = make(family, torch.float32, which=(0,), seed=54)
    flash(model)
    length = scene.inputs["input_ids"].shape[1]
    half = torch.tensor([0, length // 2, length], dtype=torch.int32)
    bounds = {"cu_seq_lens_q": half, "cu_seq_lens_k": half, "max_length_q": length - length // 2}
    bounds["max_length_k"] = bounds["max_length_q"]
    scene.inputs.pop("attention_mask")
    inputs = dict(scene.inputs)
    with torch.no_grad():
        whole, plain = model(**inputs).logits, model(**inputs, **bounds).logits
        assert not torch.allclose(whole[:, -1], plain[:, -1], atol=0.01)
        with applied(model, ratio=1.0):
            assert torch.equal(model(**inputs, **bounds).logits, plain)
        with applied(model, **OPTIONS):
            for name, value in bounds.items():
                with pytest.raises(UnsupportedInputError, match=f"several sequences packed into one row.*got {name}"):
                    model(**inputs, **{name: value})


@pytest.mark.parametrize("which", [(0,), (0, 1, 2)], ids=["alone", "padded"])
def test_windows(which, loaded):
    """One that nothing reaches is none. Beyond it, FlashAttention would count tokens of which some are gone."""
    _, scene = windowed(8, which)
    length, said = scene.inputs["input_ids"].shape[1], "which flash_attention_2 counts after pruning: use model.set_att"
    for window in (length + NEW, length, length - 1):
        model, scene = windowed(window, which)
        want = scene.want(model, **OPTIONS)
        flash(model)
        with applied(model, **OPTIONS):
            if window < length:
                with pytest.raises(UnsupportedInputError, match=said):
                    forward(model, scene)
                break
            logits = forward(model, scene)
            torch.testing.assert_close(logits[want.left], want.logits[want.left], **CLOSE)
            if window == length:
                with pytest.raises(UnsupportedInputError, match=said):
                    generate(model, scene)
                continue
            new, steps = generate(model, scene)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(steps, scene.want(model, new, **OPTIONS).logits[:, -NEW - 1 : -1], **CLOSE)
