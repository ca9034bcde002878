"""What users read of a prefill: the report's numbers against arithmetic counted as it runs, and all its forms."""

import html.parser
import json
from functools import partial

import pytest
import torch
from families import FAMILIES, make
from tiny import LAYERS, V5, N, batch, images, tiny_llava, tokens
from torch.utils.flop_counter import FlopCounterMode

import lp_patch
from lp_patch.registry import find_parts
from lp_patch.report import part_costs
from lp_patch.trace import Encoded

COUNTED = {"llava", "llava_next", "llava_next_video", "llava_onevision", "internvl", "idefics3", "smolvlm"}
FIRST, SECOND = tokens(3, "image", 9), tokens(2, "image", 4, "image", 3, seed=1)


def inputs_for(model):
    return batch([FIRST, SECOND], images(3, dtype=model.dtype))


def encode_notes(model, found):
    """Note what each encoding call of a model ran on, as the tower's own output shows."""
    parts = find_parts(model)

    def noted(encode, *args, **kwargs):
        output = encode(*args, **kwargs)
        states = getattr(output, "last_hidden_state", None)
        if states is not None and states.dim() == 3:
            found.append(Encoded(*states.shape[:2]))
        return output

    for modality in parts.modalities:
        setattr(parts.base, modality.encode, partial(noted, getattr(parts.base, modality.encode)))


def flops_of(module, run):
    """Floating-point operations that torch counts inside a module while `run` runs."""
    counted = []
    mode = FlopCounterMode(display=False)
    handles = [
        module.register_forward_pre_hook(lambda *_: counted.append(-mode.get_total_flops())),
        module.register_forward_hook(lambda *_: counted.append(mode.get_total_flops())),
    ]
    with mode, torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return sum(counted)


@pytest.mark.skipif(not V5, reason="before transformers 5 the tower's states do not leave the encoding method")
@pytest.mark.parametrize("family", FAMILIES)
def test_tower_arithmetic_is_what_runs(family):
    model, scene = make(family, dtype=torch.float32, attention="eager", which=(0, 1))
    parts = find_parts(model)
    tower = parts.adapter.tower and parts.adapter.tower(parts.base)
    assert (tower is not None) == (family in COUNTED)
    if tower is None:
        return
    encoded = []
    encode_notes(model, encoded)
    want = flops_of(tower, lambda: model(**scene.forward()))
    (cost,) = part_costs(encoded, tower, None)
    assert cost.name == "vision tower" and cost.flops == cost.full_flops
    assert want > 0 and cost.flops == want
    assert part_costs([], tower, parts.projector) == []


def test_a_tower_that_packs_its_pictures_is_not_counted():
    model = tiny_llava(dtype=torch.float32)
    adapter = find_parts(model).adapter
    assert adapter.tower(model.model) is model.model.vision_tower
    model.config.vision_config.model_type = "pixtral"
    assert adapter.tower(model.model) is None


def test_projector_arithmetic_is_what_runs():
    model = tiny_llava(dtype=torch.float32, attention="eager")
    projector, inputs = model.model.multi_modal_projector, inputs_for(model)
    full = flops_of(projector, lambda: model(**inputs))
    with lp_patch.applied(model, tokens=5) as patch:
        pruned = flops_of(projector, lambda: model(**inputs))
        report = patch.report()
    tower, cost = report.parts
    assert (cost.name, cost.tokens, cost.full_tokens) == ("projector", 3 * 9, 3 * N)
    assert (cost.flops, cost.full_flops) == (pruned, full)
    decoder = sum(x.flops for x in report.layers), sum(x.full_flops for x in report.layers)
    assert report.flops_ratio == pytest.approx(decoder[0] / decoder[1])
    want = (decoder[0] + pruned + tower.flops) / (decoder[1] + full + tower.flops)
    assert report.prefill_ratio == pytest.approx(want)
    assert report.flops_ratio < report.prefill_ratio < 1
    text = str(report)
    assert f"x{report.flops_ratio:.3f} ({1 / report.flops_ratio:.1f}x less), KV cache x" in text
    assert f"with vision tower and projector x{want:.3f} ({1 / want:.1f}x less)" in text


def report_of(model, **options):
    with lp_patch.applied(model, **options) as patch, torch.no_grad():
        model(**inputs_for(model))
        return patch.report(), patch.trace


def test_what_is_not_known_is_said_and_not_guessed():
    report, _ = report_of(tiny_llava(), tokens=5)
    report.parts.clear()
    assert report.prefill_ratio is None
    assert "vision tower not counted, projector not counted" in str(report)


def test_before_a_prefill_there_is_nothing_to_divide():
    model = tiny_llava()
    with lp_patch.applied(model, tokens=5) as patch:
        report = patch.report()
        assert report.flops_ratio is None and report.kv_ratio is None and report.prefill_ratio is None
        for text in (str(report), repr(report), report._repr_html_()):
            assert "no prefill yet" in text
        found = json.loads(json.dumps(report.to_dict()))
        assert found["settings"]["tokens"] == 5
        assert found["visual_tokens"] is None and found["layers"] == found["parts"] == []
        with torch.no_grad():
            model(**batch([tokens(4)], None))
        assert "no visual tokens in the latest prefill (1 prompts, 4 text tokens)" in str(patch.report())
        assert "no visual tokens" in patch.report()._repr_html_()
        assert patch.report().flops_ratio == 1.0


def test_settings_are_those_that_ran():
    report, _ = report_of(tiny_llava(), tokens=5, diversity=0)
    settings = report.to_dict()["settings"]
    assert (settings["scorer"], settings["layer"], settings["ratio"]) == ("diversity", 2, None)
    assert "settings: tokens=5, layer=2, stage_ratio=3.0, diversity=0, scorer='diversity', text_scorer='text'" in str(
        report
    )


@pytest.mark.parametrize(("wipe", "stages"), [(None, "111111"), (5, "11111w")])
def test_without_stage_2_none_is_shown(wipe, stages):
    model = tiny_llava(dtype=torch.float32)
    with torch.no_grad(), lp_patch.applied(model, tokens=4, stage_ratio=1, final_wipe_layer=wipe) as patch:
        model(**inputs_for(model))
    report = patch.report()
    assert "".join(x.stage[0] for x in report.layers) == stages
    assert report.settings["layer"] is None and "text_scorer" not in str(report)


def test_everything_goes_through_json():
    report, trace = report_of(tiny_llava(), tokens=5, final_wipe_layer=5)
    found = json.loads(json.dumps(report.to_dict()))
    assert found["visual_tokens"] == [N, 2 * N] and found["text_tokens"] == trace.text_tokens
    assert found["tokens_per_layer"] == trace.tokens_per_layer
    assert [x["kv_bytes"] for x in found["layers"]] == [x.kv_bytes for x in report.layers]
    assert found["flops_ratio"] == report.flops_ratio and found["kv_ratio"] == report.kv_ratio
    assert len(found["layers"]) == LAYERS


def test_full_budget_is_no_saving():
    report, _ = report_of(tiny_llava(), ratio=1.0)
    assert "decoder arithmetic of the prefill x1.000, KV cache x1.000 of unpruned" in str(report)


class Cells(html.parser.HTMLParser):
    """The cells of a page's tables, and its tags."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.cells = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.tags[-1] in ("td", "th"):
            self.cells[-1] += data


def test_a_notebook_shows_the_same_table():
    report, trace = report_of(tiny_llava(), tokens=5, final_wipe_layer=5)
    page = Cells(report._repr_html_())
    lines = str(report).splitlines()
    rows = [line.split() for line in lines[1:-3]]
    cells = [page.cells[i : i + 7] for i in range(0, len(page.cells), 7)]
    assert cells[0][0] == "layers" and [" ".join(row).split() for row in cells[1:]] == rows[1:]
    first, second = (sum(map(len, x)) for x in (trace.stage1, trace.stage2))
    assert [row[:3] for row in cells[-3:]] == [
        ["1-2", "1", f"{first}"],
        ["3-5", "2", f"{second}"],
        ["6-6", "wiped", "0"],
    ]
    assert page.tags.count("tr") == len(rows)
    # an option may hold any text
    report.settings["scorer"] = "<script>"
    assert "<script>" not in report._repr_html_()


def test_reprs_are_short_and_show_no_tensor():
    model = tiny_llava()
    rows = [tokens(2, "image", 3, seed=i) for i in range(12)]
    with lp_patch.applied(model, tokens=5) as patch, torch.no_grad():
        model(**batch(rows, images(12)))
        for shown in (patch.trace, patch.report(), patch):
            assert len(repr(shown)) < 300 and "\n" not in repr(shown) and "tensor" not in repr(shown)
            assert repr(shown).startswith(f"<lp_patch.{type(shown).__name__}")
        assert "12 prompts, of [36, 36, 36, 36, 36, 36, ...] visual tokens [9, 9," in repr(patch.trace)
        assert f"x{patch.report().flops_ratio:.3f}" in repr(patch.report())
