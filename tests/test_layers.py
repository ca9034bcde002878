"""Layers that see a window, blocks that see both ways, and layers with a state: what the engine knows of each."""

from dataclasses import replace

import masked
import pytest
import shortened
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CACHE
from tiny_models import TYPES, common, make
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

import lp_patch
from lp_patch import cache as kv
from lp_patch.cut import take_mask
from lp_patch.registry import find_parts
from lp_patch.training import GatedModel

CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
NEW = 3


def windowed(window, which=(0, 1, 2), seed=1):
    """LLaVA over Mistral with a window of so many tokens."""
    stock = TYPES["llava:window"]

    def config():
        found = stock.config()
        found.text_config.sliding_window = window
        return found

    tiny = replace(stock, config=config)
    return common.build(tiny, seed=seed), common.scene(tiny, which=which)


@torch.no_grad()
def forward(model, scene, **more):
    return model(**scene.forward(), **more)


# ---------------------------------------------------------------------- masks and caches by themselves


@given(st.data(), st.sampled_from([1, 3]), st.integers(1, 2), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_take_mask(data, of, heads, queries, keys, is_bool):
    """Against plain loops; a mask for all rows, or one for each."""
    batch, lowest = 3, torch.finfo(torch.float32).min
    seen = torch.rand(of, heads, queries, keys, generator=torch.Generator().manual_seed(keys)) > 0.5
    mask = seen if is_bool else torch.zeros(seen.shape).masked_fill(~seen, lowest)
    draw = [
        data.draw(st.lists(st.integers(-1, n - 1), min_size=batch * m, max_size=batch * m))
        for n, m in ((queries, 4), (keys, 5))
    ]
    rows, columns = (torch.tensor(x).view(batch, -1) for x in draw)
    rows = data.draw(st.sampled_from([rows, None]))
    got = take_mask(mask, rows, columns)
    assert got.dtype == mask.dtype
    wanted = [list(range(queries))] * batch if rows is None else rows.tolist()
    for b in range(batch):
        for h in range(heads):
            for i, row in enumerate(wanted[b]):
                for j, column in enumerate(columns[b].tolist()):
                    there = column >= 0 and bool(seen[b % of, h, max(row, 0), column])
                    assert got[b, h, i, j] == (there if is_bool else 0.0 if there else lowest)


class Windowed:
    """A cache of one layer with a window, whose keys are the positions of their tokens, and a list of those per row."""

    def __init__(self, window, kept, seen):
        self.window, self.seen = window, seen
        length = max(map(len, kept))
        self.rows = [[-1] * (length - len(row)) + row for row in kept]
        self.cache = Cache(layers=[DynamicSlidingWindowLayer(sliding_window=window)])
        self.cache.layers[0].activate_past_recording()
        where = torch.tensor(self.rows)
        self._store(where)
        tail = next(n for n in range(length + 1) if n == length or len({row[-n - 1] for row in self.rows}) > 1)
        valid = None if (where >= 0).all() else where >= 0
        stored = kv.Stored(seen - length, valid=valid, where=where, covered=length, tail=tail, history=(1,))
        kv.mark_pruned(self.cache, 0, stored)
        self.cache.layers[0].crop(0)

    def _store(self, positions):
        if isinstance(self.cache.layers[0], kv.PrunedLayer):
            kv.lead(self.cache)
        keys = positions[:, None, :, None].double()
        self.cache.layers[0].update(keys, keys)

    def step(self, new, back=0):
        """Tokens that follow, the last few of which are taken back; None: the cache is not asked to forget any yet."""
        positions = torch.arange(self.seen, self.seen + new).expand(len(self.rows), -1)
        self._store(positions)
        if back is not None:
            self.cache.layers[0].crop(-back)
        new -= back or 0
        self.rows = [[*row, *range(self.seen, self.seen + new)] for row in self.rows]
        self.seen += new

    def take_back(self, count):
        """Before anything followed."""
        self.cache.layers[0].crop(-count)
        self.seen -= count
        self.rows = [row[:-count] for row in self.rows]

    def check(self, fresh=2):
        """What lies in the cache, what it says of that, and which of its keys are real."""
        want = torch.tensor([row[-self.window + 1 :] for row in self.rows])
        assert self.cache.layers[0].get_seq_length() == self.seen
        torch.testing.assert_close(self.cache.layers[0].keys[:, 0, -want.shape[1] :, 0].long(), want)
        found = kv.positions(self.cache, 0, self.seen, len(self.rows), torch.device("cpu"))
        torch.testing.assert_close(found, want)
        assert kv.stored_tokens(self.cache, 0) == want.shape[1]
        real = torch.ones(len(self.rows), self.seen + fresh, dtype=torch.bool)
        real[0, -1] = False
        want = torch.cat([want >= 0, real[:, -fresh:]], dim=1)
        torch.testing.assert_close(kv.valid_keys(self.cache, 0, real, fresh, None), want)


KEPT = [[0, 1, 2, 5, 6, 7], [0, 3, 4, 5, 6, 7], [5, 6, 7]]


@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 2]], ids=["even", "padded"])
@pytest.mark.parametrize("window", [3, 5, 6, 7, 8, 40])
def test_a_window_that_forgets_pruned_tokens(window, rows):
    """Single steps, several tokens at once, beams in another order, tokens taken back."""
    it = Windowed(window, [KEPT[i] for i in rows], seen=8)
    it.check()
    for new, back in ((1, 0), (1, None), (3, None), (1, 0), (4, 2), (1, 0)):
        it.step(new, back)
        it.check()
    it.cache.reorder_cache(torch.tensor(rows[::-1]))
    it.rows.reverse()
    it.check()
    it.step(2)
    it.check()


@pytest.mark.parametrize("window", [7, 40])
def test_taking_back_what_every_row_kept(window):
    it = Windowed(40, KEPT, seen=8)
    it.take_back(2)
    it.check()
    it.step(3)
    it.check()
    with pytest.raises(lp_patch.UnsupportedInputError, match=r"crop\(-5\) would cut into pruned visual tokens"):
        it.cache.layers[0].crop(-5)


# ---------------------------------------------------------------------- windows


@pytest.fixture
def no_full_masks(monkeypatch):
    def fail(*given):
        raise AssertionError("a mask over all tokens was made")

    monkeypatch.setattr("lp_patch.engine.full_masks", fail)


def test_a_prompt_within_the_window_makes_no_mask_over_all_tokens(no_full_masks):
    _, scene = windowed(8)
    length = scene.inputs["input_ids"].shape[1]
    model, scene = windowed(length)
    want = scene.want(model, tokens=4, layer=2)
    with lp_patch.applied(model, tokens=4, layer=2):
        logits = forward(model, scene).logits
    torch.testing.assert_close(logits[want.left], want.logits[want.left], **CLOSE)
    model, scene = windowed(length - 1)
    with lp_patch.applied(model, tokens=4, layer=2), pytest.raises(AssertionError, match="a mask over all tokens"):
        forward(model, scene)


@pytest.mark.parametrize("which", [(0,), (0, 1, 2)], ids=["alone", "padded"])
@pytest.mark.parametrize("more", [0, 1, 2])
def test_generation_that_reaches_the_window(more, which, no_full_masks):
    """The prefill's layers see all of it; the steps' masks say what is in the window, which counts removed tokens."""
    _, scene = windowed(8, which)
    model, scene = windowed(scene.inputs["input_ids"].shape[1] + more, which)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with lp_patch.applied(model, tokens=4, layer=2):
        out = model.generate(**scene.inputs, **options)
    want = scene.want(model, out.sequences[:, -NEW:], tokens=4, layer=2).logits[:, -NEW - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), want, **CLOSE)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_layers_that_cannot_rank(kind):
    """Those with a window or a state; stage 1 alone may stand before any."""
    model, _ = make(kind)
    kinds = find_parts(model).kinds
    able = [i + 1 for i, name in enumerate(kinds.names[:-1]) if name == "full"]
    assert kinds.scoring() == able and len(able) in (1, 2)
    with lp_patch.applied(model) as patch:
        assert patch.report().settings["layer"] in able
    for layer in range(1, len(kinds.names)):
        if layer in able:
            with lp_patch.applied(model, layer=layer):
                continue
        said = rf"decoder layer {layer} of .* Use layer={' or '.join(map(str, able))}, or stage_ratio=1"
        with pytest.raises(lp_patch.ConfigError, match=said):
            lp_patch.apply(model, layer=layer)
        with lp_patch.applied(model, layer=layer, stage_ratio=1):
            pass
    assert not lp_patch.is_applied(model)


@pytest.mark.parametrize("kind", ["llava:window", "gemma3"])
def test_compact_positions_are_refused_where_windows_count(kind):
    model, _ = make(kind)
    with pytest.raises(lp_patch.ConfigError, match=r'positions="compact" has no meaning for .* masks say'):
        lp_patch.apply(model, positions="compact")
    assert not lp_patch.is_applied(model)


@pytest.mark.parametrize("kind", ["llava:window", "gemma3", "qwen3_5"])
def test_a_pruner_is_not_trained_under_windows_or_states(kind):
    model, _ = make(kind)
    with pytest.raises(lp_patch.UnsupportedModelError, match=r"a pruner cannot be trained on .* windows, or a state"):
        GatedModel(model.requires_grad_(False))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "llava:window"])
def test_reported_keys_are_those_in_the_cache(kind):
    """None in layers with a state, and no more than a window's."""
    model, scene = make(kind, which=(1,))

    def stored():
        layers = getattr(forward(model, scene, use_cache=True), CACHE).layers
        return [x.keys.nbytes + x.values.nbytes if hasattr(x, "get_seq_length") else 0 for x in layers]

    full = stored()
    with lp_patch.applied(model, tokens=2, layer=TYPES[kind].layer) as patch:
        pruned, report = stored(), patch.report()
    assert [x.kv_bytes for x in report.layers] == pruned
    assert [x.full_kv_bytes for x in report.layers] == full
    assert (0 in full) == (kind == "qwen3_5")
    assert sum(pruned) == sum(full) if kind == "llava:window" else sum(pruned) < sum(full)  # its windows are full
    assert all(x.flops < x.full_flops for x in report.layers)


# ---------------------------------------------------------------------- turns


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "llava:window"])
def test_second_turn_with_a_new_picture(kind):
    """On a kept cache, where the first picture chooses no more; positions are given, as Qwen cannot count them on."""
    tiny = TYPES[kind]
    model = common.build(tiny, seed=7)
    one, two = (common.scene(replace(tiny, rows=(row,)), which=(0,)) for row in ((*tiny.rows[0], 4), tiny.rows[0][1:]))
    along = {"input_ids", "attention_mask", tiny.typed}
    inputs = {name: torch.cat([x, two.inputs[name]], dim=int(name in along)) for name, x in one.inputs.items()}
    length = one.inputs["input_ids"].shape[1]
    ids = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: ids.append(kwargs["position_ids"]), with_kwargs=True
    )
    whole = model(**inputs).logits
    handle.remove()
    ids = torch.arange(whole.shape[1])[None] if ids[0] is None else ids[0]

    def turns():
        first = model(**one.inputs, position_ids=ids[..., :length], use_cache=True)
        trace = lp_patch.is_applied(model) and patch.trace
        given = {**two.inputs, "attention_mask": inputs["attention_mask"], "position_ids": ids[..., length:]}
        if tiny.typed == "token_type_ids":  # Gemma 3 makes masks of them, over all keys
            given[tiny.typed] = inputs[tiny.typed]
        return first.logits, model(**given, **{CACHE: getattr(first, CACHE)}).logits, trace

    torch.testing.assert_close(torch.cat(turns()[:2], dim=1), whole, **CLOSE)  # stock can
    options = {"tokens": 4, "layer": tiny.layer}
    with lp_patch.applied(model, **options) as patch:
        first, second, trace = turns()
    decoder = model.get_decoder()
    options["run"] = shortened if kind == "qwen3_5" else masked

    def want_of(visual, scene, **more):
        features = scene.projected(model) if tiny.projector else None
        given = {**inputs, "position_ids": ids}
        return masked.expected(model, decoder.layers, decoder, given, visual, features=features, **options, **more)

    want = want_of(one.visual, one, end=length)
    assert [x.tolist() for x in trace.stage2] == want.stage2
    left = want.left[:, :length]
    torch.testing.assert_close(first[left], want.logits[:, :length][left], **CLOSE)
    later = [[[length + x for x in picture] for picture in row] for row in two.visual]
    want = want_of(later, two, earlier=want.hidden)
    assert [x.tolist() for x in patch.trace.stage1] == want.stage1
    assert [x.tolist() for x in patch.trace.stage2] == want.stage2
    left = want.left[:, length:]
    torch.testing.assert_close(second[left], want.logits[:, length:][left], **CLOSE)


def test_masks_of_a_caller_are_refused_where_nothing_else_would_make_them():
    for model, scene in [windowed(8, which=(0,)), windowed(400, which=(0,)), make("vipllava", which=(0,))]:
        length = scene.inputs["input_ids"].shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        inputs = {**scene.forward(), "attention_mask": mask}
        refused = pytest.raises(lp_patch.UnsupportedInputError, match=r"needs the 2-D attention mask .*, got one of sh")
        with torch.no_grad(), lp_patch.applied(model, tokens=4, layer=2), refused:
            model(**inputs)
        with torch.no_grad(), lp_patch.applied(model, ratio=1.0):
            assert model(**inputs).logits.isfinite().all()
