"""Generation in the modes that people use, each step's logits against the oracle's on the same tokens."""

import threading

import pytest
import torch
from oracle import expected, generated
from test_forward import CASES, DTYPES, split_options
from tiny import CACHE, PAD, PRE_ENCODES, V5, N, batch, images, pre_encodes, since_5, tiny_llava, tokens
from transformers import DynamicCache, QuantizedCache, StaticCache, TextIteratorStreamer

import lp_patch

NEW = 5
CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}  # generate() hands out float32 logits


def generate(model, inputs, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)


def check_steps(model, out, row, prompt, pixels, width, **theirs):
    """Every step's logits of one output row are the oracle's on what was generated until then."""
    new = out.sequences[row, width:].tolist()
    turns = theirs.pop("turns", [len(prompt)])
    want = expected(model, prompt + new, pixels, turns=turns, **theirs).logits
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits[row], want[len(prompt) - 1 + step], **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_greedy(case, kv_heads, attention):
    model = tiny_llava(seed=kv_heads + 10, kv_heads=kv_heads, attention=attention, dtype=DTYPES[attention])
    ours, theirs = split_options(case)
    ids, pixels = tokens(4, "image", 7, seed=1), images(1, dtype=DTYPES[attention])
    with lp_patch.applied(model, **ours) as patch:
        out = generate(model, batch([ids], pixels))
        stages = patch.trace.stage1[0].tolist(), patch.trace.stage2[0].tolist()
    check_steps(model, out, 0, ids, pixels, len(ids), **theirs)
    want = expected(model, ids, pixels, **theirs)
    assert stages == (want.stage1, want.stage2)
    assert out.sequences[0, len(ids) :].tolist() == generated(model, ids, pixels, NEW, **theirs)


@pytest.mark.parametrize("case", ["tokens", "wipe", "compact", "stage 1 alone", "learned"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("beams", [1, 3])
def test_padded_batch(case, attention, beams):
    model = tiny_llava(seed=7, kv_heads=2, attention=attention, dtype=DTYPES[attention])
    ours, theirs = split_options(CASES[case])
    # older beams repeat raw images one by one, which mixes up the prompts of several
    second = (2, "image", 4, "image", 3) if beams == 1 or PRE_ENCODES else (2, "image", 7)
    prompts = [tokens(3, "image", 9), tokens(*second, seed=1), tokens(6, seed=2)]
    pixels = images(1 + second.count("image"), dtype=DTYPES[attention])
    inputs = batch(prompts, pixels)
    own = [pixels[:1], pixels[1:], pixels[:0]]
    with lp_patch.applied(model, **ours):
        if beams == 1:
            out = generate(model, inputs)
            for row in range(3):
                check_steps(model, out, row, prompts[row], own[row], inputs["input_ids"].shape[1], **theirs)
            return
        # a beam's score is the oracle's log-likelihood of what it says
        out = generate(model, inputs, num_beams=beams, num_return_sequences=2, length_penalty=0.0, output_scores=True)
    for i, sequence in enumerate(out.sequences):
        prompt = prompts[i // 2]
        new = sequence[inputs["input_ids"].shape[1] :].tolist()
        logits = expected(model, prompt + new, own[i // 2], turns=[len(prompt)], **theirs).logits
        score = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(new)[:, None]).sum()
        assert float(out.sequences_scores[i]) == pytest.approx(float(score), abs=2e-3)


def test_sampling_several_sequences():
    model = tiny_llava(seed=8)
    second = (2, "image", 4, "image", 3) if PRE_ENCODES else (2, "image", 7)
    prompts = [tokens(3, "image", 9), tokens(*second, seed=1)]
    pixels = images(1 + second.count("image"))
    inputs = batch(prompts, pixels)
    with lp_patch.applied(model, tokens=5):
        torch.manual_seed(0)
        out = generate(model, inputs, do_sample=True, num_return_sequences=3, top_k=0, temperature=1.0)
    assert len({tuple(x.tolist()) for x in out.sequences}) > 2
    for row in range(6):
        own = pixels[:1] if row < 3 else pixels[1:]
        check_steps(model, out, row, prompts[row // 3], own, inputs["input_ids"].shape[1], tokens=5)


def test_without_cache_every_step_is_a_prefill():
    model = tiny_llava(seed=9)
    ids, pixels = tokens(3, "image", 9), images(1)
    with lp_patch.applied(model, tokens=5):
        out = generate(model, batch([ids], pixels), use_cache=False)
    full = list(ids)
    for logits, new in zip(out.logits, out.sequences[0, len(ids) :].tolist(), strict=True):
        torch.testing.assert_close(logits[0], expected(model, full, pixels, tokens=5).logits[-1], **CLOSE)
        full.append(new)


@since_5
@pytest.mark.parametrize("how", ["full ids", "new ids"])
@pytest.mark.parametrize("case", ["tokens", "wipe", "compact"])
@pytest.mark.parametrize("second", ["text", "image"])
def test_second_turn_on_a_kept_cache(how, case, second):
    model = tiny_llava(seed=11, kv_heads=2)
    ours, theirs = split_options(CASES[case])
    pixels = images(2)
    first = tokens(3, "image", 6)
    with lp_patch.applied(model, **ours):
        out = generate(model, batch([first], pixels[:1]))
        history = out.sequences[0].tolist()
        # the last generated token is not in the cache yet
        assert out[CACHE].get_seq_length() == len(history) - 1
        ids = history + (tokens(5, seed=3) if second == "text" else tokens(2, "image", 4, seed=3))
        again = {"input_ids": torch.tensor([ids if how == "full ids" else ids[len(history) - 1 :]])}
        again["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
        if second == "image":
            again["pixel_values"] = pixels[1:]
        out = generate(model, again, **{CACHE: out[CACHE]})
    turns = [len(first)] if second == "text" else [len(first), len(ids)]
    width = len(ids) if how == "full ids" else len(ids) - len(history) + 1
    used = pixels[:1] if second == "text" else pixels
    check_steps(model, out, 0, ids, used, width, turns=turns, **theirs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["tokens", "wipe", "compact", "stage 1 alone"])
def test_manual_turns_of_a_padded_batch(case, attention):
    """Forward calls with a kept cache: prompt, a text turn of several tokens, a turn with new images, one token."""
    dtype = DTYPES[attention]
    model = tiny_llava(seed=12, kv_heads=2, attention=attention, dtype=dtype)
    ours, theirs = split_options(CASES[case])
    pixels = images(5, dtype=dtype)
    rows = [[(3, "image", 9), (4,), ("image", 5), (1,)], [("image", 2, "image", 4), (4,), (2, "image", 3), (1,)]]
    ids = [[tokens(*part, seed=10 * i + j) for j, part in enumerate(row)] for i, row in enumerate(rows)]
    own = [pixels[[0, 3]], pixels[[1, 2, 4]]]
    shown = [pixels[:3], None, pixels[3:], None]
    cache, masks, got = DynamicCache(), [], [[], []]
    with lp_patch.applied(model, **ours), torch.no_grad():
        for turn in range(4):
            inputs = batch([row[turn] for row in ids], shown[turn])
            seen = sum(m.shape[1] for m in masks)
            assert cache.get_seq_length() == seen
            masks.append(inputs["attention_mask"])
            mask = torch.cat(masks, 1)
            position_ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, seen:]
            inputs |= {"attention_mask": mask, "position_ids": position_ids}
            out = model(**inputs, **{CACHE: cache})
            for i in range(2):
                got[i].append(out.logits[i][masks[-1][i].bool()])
    for i, row in enumerate(ids):
        lengths = [len(part) for part in row]
        turns = [sum(lengths[:1]), sum(lengths[:2]), sum(lengths[:3])]
        want = expected(model, [t for part in row for t in part], own[i], turns=turns, **theirs)
        torch.testing.assert_close(torch.cat(got[i]), want.logits, **CLOSE)


@since_5
@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 2}, {"assistant": True}])
def test_assisted_decoding_equals_greedy(options):
    model = tiny_llava(seed=13)
    if options.pop("assistant", False):
        options["assistant_model"] = tiny_llava(seed=14)
    # repeated text, so that the look-up has guesses for the first forward
    ids, pixels = [*tokens(3, "image"), *tokens(5, seed=2) * 3], images(1)
    with lp_patch.applied(model, tokens=5):
        out = model.generate(**batch([ids], pixels), max_new_tokens=12, do_sample=False, **options)
    assert out[0, len(ids) :].tolist() == generated(model, ids, pixels, 12, tokens=5)


@pre_encodes
def test_assisted_decoding_of_a_prompt_that_ends_in_an_image():
    model = tiny_llava(seed=13)
    ids, pixels = tokens(6, "image"), images(1)
    with lp_patch.applied(model, tokens=4):
        out = model.generate(
            **batch([ids], pixels), max_new_tokens=8, do_sample=False, assistant_model=tiny_llava(seed=63)
        )
    assert out[0, len(ids) :].tolist() == generated(model, ids, pixels, 8, tokens=4)


@pre_encodes
@torch.no_grad()
@pytest.mark.parametrize("encoded", ["patched", "unpatched"])
def test_features_from_the_caller(encoded):
    model = tiny_llava(seed=15)
    ids, pixels = tokens(3, "image", 9), images(1)
    inputs = batch([ids], None)
    if encoded == "unpatched":
        with torch.no_grad():
            features = model.get_image_features(pixels, return_dict=True)
    with lp_patch.applied(model, tokens=5, scorer="cls" if encoded == "patched" else "diversity") as patch:
        if encoded == "patched":
            features = model.get_image_features(pixels, return_dict=True)
        kept = features.pooler_output[0].clone()
        out = generate(model, inputs, mm_encoder_outputs={"image": features})
        assert torch.equal(features.pooler_output[0].nan_to_num(), kept.nan_to_num()), (
            "the caller's features were changed"
        )
        stage1 = patch.trace.stage1[0].tolist()
    if encoded == "patched":
        check_steps(model, out, 0, ids, pixels, len(ids), tokens=5, scorer="cls")
        return
    # the projected features are all there is to measure diversity on
    from oracle import farthest

    assert stage1 == sorted(farthest(features.pooler_output[0], [], len(stage1)))
    assert len(stage1) == 9


@pre_encodes
def test_features_from_outside_warn_once_if_the_scorer_needs_the_encoder():
    model = tiny_llava(seed=15)
    features = model.get_image_features(images(1), return_dict=True)
    inputs = batch([tokens(3, "image", 9)], None)
    with lp_patch.applied(model, tokens=5, scorer="cls") as patch, torch.no_grad():
        with pytest.warns(UserWarning, match='pruned by "diversity"') as caught:
            model(**inputs, mm_encoder_outputs={"image": features})
            model(**inputs, mm_encoder_outputs={"image": features})
        assert len(caught) == 1
        assert len(patch.trace.stage1[0]) == 9


def test_inputs_embeds_with_placeholders():
    model = tiny_llava(seed=16)
    ids, pixels = tokens(3, "image", 9), images(1)
    embeds = model.get_input_embeddings()(torch.tensor([ids])).detach()
    with lp_patch.applied(model, tokens=5), torch.no_grad():
        got = model(inputs_embeds=embeds, pixel_values=pixels).logits[0]
    torch.testing.assert_close(got, expected(model, ids, pixels, tokens=5).logits, **CLOSE)


@pre_encodes
def test_merged_pruned_features_are_refused():
    model = tiny_llava(seed=16)
    embeds = model.get_input_embeddings()(torch.tensor([tokens(3, "image", 9)])).detach()
    with lp_patch.applied(model, tokens=5), torch.no_grad():
        embeds[:, 3 : 3 + N] = model.get_image_features(images(1), return_dict=True).pooler_output[0]
        with pytest.raises(lp_patch.UnsupportedInputError, match="already merged"):
            model(inputs_embeds=embeds)


@since_5
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["tokens", "wipe", "compact", "stage 1 alone"])
def test_static_cache(case, attention):
    """Slots of short layers stay masked; generate() brings 4-D masks that were made for the whole prompt."""
    model = tiny_llava(seed=17, kv_heads=2, attention=attention, dtype=DTYPES[attention])
    ours, theirs = split_options(CASES[case])
    prompts = [tokens(3, "image", 9), tokens(2, "image", 4, "image", 3, seed=1), tokens(6, seed=2)]
    pixels = images(3, dtype=DTYPES[attention])
    own = [pixels[:1], pixels[1:], pixels[:0]]
    for rows in ([0], [0, 1, 2]):
        inputs = batch([prompts[i] for i in rows], torch.cat([own[i] for i in rows]))
        width = inputs["input_ids"].shape[1]
        cache = StaticCache(config=model.config.text_config, max_cache_len=width + NEW)
        with lp_patch.applied(model, **ours):
            out = generate(model, inputs, **{CACHE: cache})
        assert int(cache.get_seq_length()) == width + NEW - 1
        for row, i in enumerate(rows):
            check_steps(model, out, row, prompts[i], own[i], width, **theirs)


def test_static_cache_is_free_at_full_budget_and_refused_where_it_cannot_be_right():
    model = tiny_llava(seed=17, dtype=torch.float32)
    inputs = batch([tokens(3, "image", 9)], images(1, dtype=torch.float32))

    def answer():
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        return model.generate(**inputs, **{CACHE: cache}, max_new_tokens=3, do_sample=False)

    want = answer()
    with lp_patch.applied(model, tokens=N):
        assert torch.equal(answer(), want)
    if not V5:
        with lp_patch.applied(model, tokens=5), pytest.raises(lp_patch.UnsupportedInputError, match="static"):
            answer()


def test_streaming_from_a_thread():
    model = tiny_llava(seed=18)
    ids, pixels = tokens(3, "image", 9), images(1)

    class Tokenizer:
        def decode(self, ids, **_):
            return "".join(f"<{int(i)}> " for i in ids)

    streamer = TextIteratorStreamer(Tokenizer(), skip_prompt=True)
    with lp_patch.applied(model, tokens=5) as patch:
        worker = threading.Thread(
            target=model.generate,
            kwargs={**batch([ids], pixels), "max_new_tokens": NEW, "do_sample": False, "streamer": streamer},
        )
        worker.start()
        text = "".join(streamer)
        worker.join()
        assert len(patch.trace.stage1[0]) == 9  # the other thread's prefill
    assert text == Tokenizer().decode(generated(model, ids, pixels, NEW, tokens=5))


def test_two_threads_get_their_own_answers():
    model = tiny_llava(seed=19)
    prompts = [tokens(3, "image", 9), tokens("image", 4, "image", 6, seed=1), tokens(5, "image", 2, seed=2)]
    pixels = [images(1, seed=1), images(2, seed=2), images(1, seed=3)]
    want = [generated(model, ids, own, NEW, tokens=5) for ids, own in zip(prompts, pixels, strict=True)]
    wrong, start = [], threading.Barrier(3)
    with lp_patch.applied(model, tokens=5) as patch:

        def work(i):
            start.wait()
            for _ in range(4):
                out = model.generate(**batch([prompts[i]], pixels[i]), max_new_tokens=NEW, do_sample=False)
                if out[0, len(prompts[i]) :].tolist() != want[i] or patch.trace.visual_tokens != [len(pixels[i]) * N]:
                    wrong.append(i)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]
    assert not wrong


@pytest.mark.parametrize(
    "where", ["vision_tower", "multi_modal_projector", "language_model.layers.1.mlp", "language_model.layers.4"]
)
def test_an_exception_in_the_middle_leaves_the_next_call_right(where):
    model = tiny_llava(seed=20)
    ids, pixels = tokens(3, "image", 9), images(1)
    inputs = batch([ids], pixels)

    def fail(*_):
        raise MemoryError("as if")

    with lp_patch.applied(model, tokens=5), torch.no_grad():
        handle = model.model.get_submodule(where).register_forward_hook(fail)
        with pytest.raises(MemoryError):
            model.generate(**inputs, max_new_tokens=2)
        with pytest.raises(MemoryError):
            model(**inputs)
        handle.remove()
        text = tokens(5)
        got = model(**batch([text], None)).logits[0]
        torch.testing.assert_close(got, expected(model, text, None, tokens=5).logits, **CLOSE)
        check_steps(model, generate(model, inputs), 0, ids, pixels, len(ids), tokens=5)


def test_quantised_cache_gives_a_near_answer():
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = tiny_llava(seed=21, dtype=torch.float32)
    ids, pixels = tokens(3, "image", 9), images(1, dtype=torch.float32)
    cache = QuantizedCache("quanto", model.config.text_config, nbits=4, q_group_size=16)
    with lp_patch.applied(model, tokens=5):
        out = model.generate(**batch([ids], pixels), **{CACHE: cache}, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == len(ids) + 3 and cache.get_seq_length() == len(ids) + 2


def test_padding_never_counts():
    """The pad token is text to nobody: answers do not change with more of it."""
    model = tiny_llava(seed=22)
    ids, pixels = tokens(3, "image", 9), images(1)
    with lp_patch.applied(model, tokens=5):
        short = model.generate(**batch([ids], pixels), max_new_tokens=NEW, do_sample=False)
        padded = {
            "input_ids": torch.tensor([[PAD] * 20 + ids]),
            "attention_mask": torch.tensor([[0] * 20 + [1] * len(ids)]),
            "pixel_values": pixels,
        }
        long = model.generate(**padded, max_new_tokens=NEW, do_sample=False)
    assert short[0, len(ids) :].tolist() == long[0, 20 + len(ids) :].tolist()


def test_chunked_prefill_is_refused_with_images_and_free_without():
    model = tiny_llava(seed=23)
    ids, pixels = tokens(3, "image", 9), images(1)
    with lp_patch.applied(model, tokens=5):
        with pytest.raises(lp_patch.UnsupportedInputError, match="prefill_chunk_size=8"):
            model.generate(**batch([ids], pixels), max_new_tokens=2, do_sample=False, prefill_chunk_size=8)
        text = tokens(20)
        out = model.generate(**batch([text], None), max_new_tokens=NEW, do_sample=False, prefill_chunk_size=8)
    assert out[0, 20:].tolist() == generated(model, text, None, NEW)


def test_attentions_are_those_of_the_tokens_that_ran():
    model = tiny_llava(seed=24, attention="eager", dtype=torch.float32)
    with lp_patch.applied(model, tokens=5), torch.no_grad():
        out = model(**batch([tokens(3, "image", 9)], images(1, dtype=torch.float32)), output_attentions=True)
    assert [tuple(x.shape[2:]) for x in out.attentions] == [(21, 21)] * 2 + [(15, 15)] * 4
