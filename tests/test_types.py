"""Every model type of `tests/tiny_models` against the masked oracle: what a declaration must get right."""

from contextlib import nullcontext

import pytest
import torch
from pretended_gpu import on_gpu, pretended_gpu
from tiny import CACHE
from tiny_models import TYPES, make
from tiny_models.common import FIRST, VOCAB
from tiny_models.common import scene as scene_of

import lp_patch

NEW = 3
RUNS = ("qwen3_5",)  # stock takes no mask of a second turn
WITHIN = {"rtol": 1e-4, "atol": 1e-4}  # norms and rotary angles are float32
CLOSE = {**WITHIN, "check_dtype": False}
every = pytest.mark.parametrize("kind", TYPES)


def options(kind, **more):
    return {"tokens": 4, "layer": TYPES[kind].layer, **more}


@torch.no_grad()
def forward(model, scene, **more):
    return model(**scene.forward(), **more).logits


def generate(model, scene, **more):
    return model.generate(
        **scene.inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, **more
    )


def difference(got, want):
    """The largest one, after a check that it is small."""
    torch.testing.assert_close(got, want, **CLOSE)
    return float((got - want.to(got.dtype)).abs().max())


def check_sets(trace, want):
    assert [x.tolist() for x in trace.stage1] == want.stage1
    assert [x.tolist() for x in trace.stage2] == want.stage2


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward(kind, side, record_property):
    """A padded batch: what is kept, every logit, each row as alone; removal bit for bit."""
    model, scene = make(kind, seed=1, side=side)
    want, plain = scene.want(model, **options(kind)), forward(model, scene)
    with lp_patch.applied(model, **options(kind)) as patch:
        logits = forward(model, scene)
        check_sets(patch.trace, want)
        assert logits.shape == plain.shape
        record_property("difference", difference(logits[want.left], want.logits[want.left]))
        for row in range(3):
            alone = scene_of(TYPES[kind], which=(row,))
            real = scene.inputs["attention_mask"][row].bool()
            torch.testing.assert_close(forward(model, alone)[0], logits[row][real], **CLOSE)
            assert patch.trace.stage1[0].tolist() == want.stage1[row]
    assert not torch.allclose(logits[:2], plain[:2], rtol=0, atol=0.1)
    assert torch.equal(forward(model, scene), plain)


@every
def test_eager(kind, record_property):
    # transformers' eager softmax runs in float32, where a fully masked float64 row is NaN, patched or not
    model, scene = make(kind, seed=2, dtype=torch.float32, attention="eager")
    last = TYPES[kind].layer + 2 if TYPES[kind].wipes else None
    want = scene.want(model, **options(kind, wipe=last))
    with lp_patch.applied(model, **options(kind, final_wipe_layer=last)) as patch:
        logits = forward(model, scene)
    check_sets(patch.trace, want)
    record_property("difference", difference(logits[want.left], want.logits[want.left]))


@every
def test_generate(kind, record_property):
    """Greedy steps of a padded batch."""
    model, scene = make(kind, seed=3)
    with lp_patch.applied(model, **options(kind)) as patch:
        found = generate(model, scene)
    new = found.sequences[:, -NEW:]
    want = scene.want(model, new, **options(kind))
    check_sets(patch.trace, want)
    steps = want.logits[:, -NEW - 1 : -1]
    record_property("difference", difference(torch.stack(found.logits, dim=1), steps))


@every
def test_beams(kind):
    """A beam's score is the oracle's log-likelihood of what it says."""
    model, scene = make(kind, seed=4, which=(0,))
    search = {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.0, "output_scores": True}
    with lp_patch.applied(model, **options(kind)):
        found = generate(model, scene, **search)
    allowed = torch.arange(VOCAB) >= FIRST
    for sequence, score in zip(found.sequences, found.sequences_scores, strict=True):
        new = sequence[None, -NEW:]
        steps = scene.want(model, new, **options(kind)).logits[:, -NEW - 1 : -1]
        likely = steps.log_softmax(-1).gather(2, new[..., None]).sum()
        assert allowed[new].all()
        torch.testing.assert_close(score, likely, **CLOSE)


@every
def test_static_cache(kind, record_property):
    """Where stock runs on a static cache, so does a patched model, with the same logits."""
    model, scene = make(kind, seed=5, which=(0, 1))
    try:
        plain = generate(model, scene, cache_implementation="static", disable_compile=True)
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        record_property("cell", f"not applicable: stock cannot ({said:.100})")
        return
    if not torch.allclose(torch.stack(plain.logits), torch.stack(generate(model, scene).logits), **WITHIN):
        record_property("cell", "not applicable: stock says something else on a static cache")
        return
    with lp_patch.applied(model, **options(kind)):
        if not TYPES[kind].static:
            with pytest.raises(lp_patch.UnsupportedInputError):
                generate(model, scene, cache_implementation="static", disable_compile=True)
            record_property("cell", "refused: its static cache has no slot for each token")
            return
        found = generate(model, scene, cache_implementation="static", disable_compile=True)
        again = generate(model, scene)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(again.logits), **CLOSE)
    assert not torch.allclose(torch.stack(found.logits), torch.stack(plain.logits))


@every
@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:compile=True:UserWarning")
def test_captured(kind, cache, monkeypatch):
    """Steps after a prefill in captured regions equal those after one as it comes; so does a second turn."""
    model, scene = make(kind, seed=6, which=(0,))
    more = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    last = TYPES[kind].layer + 2 if TYPES[kind].wipes and cache == "dynamic" else None
    turn = {"more": torch.full((1, 4), FIRST + 1)}
    masked = not TYPES[kind].positions and not model.get_decoder().config.model_type.startswith(RUNS)
    found = []
    for captured in (False, True):
        with pretended_gpu(monkeypatch, model) if captured else nullcontext():
            if captured:
                scene.inputs, turn = on_gpu(scene.inputs), on_gpu(turn)
            with lp_patch.applied(model, **options(kind, final_wipe_layer=last), compile=captured):
                try:
                    found.append(torch.stack(generate(model, scene, **more).logits).cpu())
                    if cache == "dynamic":
                        found.append(second_turn(model, scene, turn["more"], masked).cpu())
                except (lp_patch.UnsupportedInputError, ValueError) as error:  # where it is refused without, it is with
                    found.append(type(error))
    half = len(found) // 2
    for got, want in zip(found[half:], found[:half], strict=True):
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(got, want, **CLOSE)
        else:
            assert got is want and cache == "static"


def second_turn(model, scene, more, masked=False):
    """The logits of `more` (B, n) on the cache of the scene's prompts; `masked`: with a mask of ones, too."""
    with torch.no_grad():
        cache = getattr(model(**scene.forward(), use_cache=True), CACHE)
        grown = scene.forward(more)
        given = {"input_ids": more, CACHE: cache}
        if scene.padded or masked:
            given["attention_mask"] = grown["attention_mask"]
        if "position_ids" in grown:
            given["position_ids"] = grown["position_ids"][:, -4:]
        return model(**given).logits


@every
def test_second_text_turn(kind):
    """Text on a kept cache, of padded rows where stock can do that."""
    model, scene = make(kind, seed=6)
    more = torch.randint(FIRST, VOCAB, (3, 4), generator=torch.Generator().manual_seed(6))
    try:
        second_turn(model, scene, more)
    except RuntimeError:  # Qwen3.5 counts positions over the whole mask
        (model, scene), more = make(kind, seed=6, which=(1,)), more[:1]
        second_turn(model, scene, more)
    with lp_patch.applied(model, **options(kind)):
        logits = second_turn(model, scene, more)
    want = scene.want(model, more, **options(kind)).logits[:, -4:]
    torch.testing.assert_close(logits, want, **CLOSE)


@every
def test_nothing_to_prune(kind):
    """Full budget, and text alone: bit for bit, generation too."""
    model, scene = make(kind, seed=7)
    text = scene_of(TYPES[kind], which=(2,))
    plain, said = forward(model, scene), generate(model, scene).sequences
    plain_text = forward(model, text)
    with lp_patch.applied(model, ratio=1.0):
        assert torch.equal(forward(model, scene), plain)
        assert torch.equal(generate(model, scene).sequences, said)
    with lp_patch.applied(model, **options(kind)):
        assert torch.equal(forward(model, text), plain_text)


@pytest.mark.parametrize("kind", ["gemma3n", "gemma3", "qwen3_5", "mistral_large4"])
def test_gradients_of_a_padded_batch(kind):
    """All finite: padding slots hold what norms have a slope at."""
    model, scene = make(kind, seed=8)
    with lp_patch.applied(model, **options(kind)):
        model(**scene.forward(), labels=scene.inputs["input_ids"], use_cache=False).loss.backward()
    found = [x.grad for x in model.parameters() if x.grad is not None]
    assert len(found) > 20 and all(x.isfinite().all() for x in found)


@pytest.mark.long
def test_compiled_where_a_layer_compares_names_of_back_ends():
    model, scene = make("mistral_large4", seed=9, dtype=torch.float32, which=(0,))
    with lp_patch.applied(model, **options("mistral_large4")), torch.no_grad():
        compiled = torch.compile(model, backend="eager")(**scene.forward()).logits
        torch.testing.assert_close(compiled, forward(model, scene))
