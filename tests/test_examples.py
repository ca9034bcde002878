"""The example scripts run to their end, and what they print, draw and write is what they say it is."""

import csv
import json
import math
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from pretended_gpu import on_gpu, pretended_gpu
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import lp_patch
from lp_patch import strategies
from lp_patch.merging import MergingPruner
from lp_patch.slots import SlotPruner

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import evaluate
import retention
from retention import ALONE, TEXT, Cell, base

QUESTIONS = EXAMPLES / "testbed" / "demo.json"


def run(script: str, *arguments: object, cwd: Path = ROOT) -> str:
    """Run an example as a user would, without a network; its output."""
    # one thread: shapes this small gain nothing from more, which wait for each other where the machine is busy
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_figure(path: Path) -> None:
    """A PNG that shows something: large, light and of many colours."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > 500
    assert pixels.mean() > 150
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_quickstart() -> None:
    answer, report = run("quickstart.py").split("\n", 1)
    assert answer.strip()
    assert report.startswith("lp_patch: 1 prompts, 576 of")
    assert "KV cache x0.2" in report


def test_demo(tmp_path: Path) -> None:
    questions = json.loads(QUESTIONS.read_text())["questions"]
    shipped = (EXAMPLES / "results" / "demo.png").read_bytes()
    output = run("demo.py", "--runs", 1, cwd=tmp_path)
    assert (EXAMPLES / "results" / "demo.png").read_bytes() == shipped, "a run must not change what git knows"
    for question in questions:
        assert f"{question['question']}  (truth: {question['answer']})" in output
    found = [line.split() for line in output.splitlines()]
    by_name = {
        name: [x for x in found if x and x[0] == name] for name in ("answer", "visual", "prefill", "total", "KV")
    }
    assert all(len(lines) == len(questions) for lines in by_name.values())
    assert all(len(line) >= 3 for line in by_name["answer"])
    assert all(line[2:4] == ["576", "117"] for line in by_name["visual"])
    assert all(float(line[-2].removesuffix("x")) > 5 for line in by_name["KV"])
    check_figure(tmp_path / "runs" / "demo.png")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "quick.csv"
    run("benchmark.py", "--quick", "--output", path)
    return path


@pytest.mark.long  # half a minute
def test_benchmark_rows(benchmark: Path) -> None:
    rows = read(benchmark)
    metrics = {"vision_tower", "prefill", "decode", "generate", "kv_cache", "selection", "scoring", "both_stages"}
    settings = {tuple(row[x] for x in ("visual_tokens", "budget", "batch", "scorer", "model")) for row in rows}
    assert settings == {
        ("576", "64", "1", "diversity", "llava"),
        ("576", "32", "1", "learned", "llava"),
        ("2880", "160", "1", "diversity", "llava"),
        ("576", "64", "4", "diversity", "llava"),
        ("576", "576", "1", "diversity", "llava"),
        ("640", "71", "1", "diversity", "qwen2_5_vl"),
    }
    for setting in settings:
        mine = {row["metric"] for row in rows if (row["budget"], row["batch"]) == (setting[1], setting[2])}
        wanted = metrics if setting[1] != "576" else {"vision_tower", "prefill", "decode", "kv_cache"}
        wanted = wanted | ({"decode_equal_kv"} if setting[4] == "qwen2_5_vl" else set())
        assert mine - {"peak_memory", "working_memory"} == wanted
    for row in rows:
        numbers = [float(row[x]) for x in ("patched", "ratio", "ratio_q1", "ratio_q3")]
        assert all(math.isfinite(x) and x > 0 for x in numbers)
        assert float(row["ratio_q1"]) <= float(row["ratio"]) <= float(row["ratio_q3"])
        assert all(row[x] for x in ("date", "device", "torch", "transformers", "lp_patch", "threads", "dtype", "pairs"))
    assert {row["metric"] for row in rows if "memory" in row["metric"]} == {"peak_memory", "working_memory"}
    check_figure(benchmark.with_suffix(".png"))


def test_benchmark_limit_is_the_closed_form(benchmark: Path) -> None:
    """The counted arithmetic of the tiny LLaVA, against the same worked out by hand from its shapes."""
    vision, mlp, hidden, text_mlp, layers, vocabulary, text = 64, 128, 64, 128, 4, 32064, 60
    linear = 4 * hidden**2 + 3 * hidden * text_mlp
    tower = 3 * (2 * 577 * (4 * vision**2 + 2 * vision * mlp) + 4 * vision * 577**2) + 2 * 576 * 3 * 14**2 * vision

    def prefill(projected: int, visual: list[int]) -> float:
        flops = tower + 2 * projected * (vision * hidden + hidden**2) + 2 * hidden * vocabulary
        for tokens in (n + text for n in visual):
            flops += 2 * tokens * linear + 4 * hidden * tokens * (tokens + 1) / 2
        return flops

    # k = 2 of 4 layers; R2 = ceil(4 * 64 / (3 * 2 + 2)) = 32, R1 = 96
    expected = prefill(576, [576] * layers) / prefill(96, [96, 96, 32, 32])
    row = next(x for x in read(benchmark) if (x["budget"], x["batch"], x["metric"]) == ("64", "1", "prefill"))
    assert float(row["limit"]) == pytest.approx(expected, rel=1e-3)
    assert float(row["share_of_limit"]) == pytest.approx(float(row["ratio"]) / expected, rel=1e-3)
    cache = next(x for x in read(benchmark) if (x["budget"], x["batch"], x["metric"]) == ("64", "1", "kv_cache"))
    assert float(cache["ratio"]) == pytest.approx((576 + text) / ((96 + 32) / 2 + text), rel=1e-3)


def test_benchmark_limit_of_a_tower_with_windows(benchmark: Path) -> None:
    """The same for the tiny Qwen2.5-VL: 40 x 64 patches, windows of 8 x 8 of them, its last layer and first whole."""
    width, mlp, hidden, text_mlp, vocabulary, text = 64, 128, 64, 128, 32064, 60
    patches, merged, window = 40 * 64, 640, 64
    tower = 2 * patches * 3 * 2 * 14**2 * width + 2 * merged * ((4 * width) ** 2 + 4 * width * hidden)
    for seen in (patches, window, patches):
        tower += 2 * patches * (4 * width**2 + 3 * width * mlp) + 4 * width * patches * seen

    def prefill(visual: list[int]) -> float:
        flops = tower + 2 * hidden * vocabulary
        for tokens in (n + text for n in visual):
            # half as many heads of keys and values as of queries
            flops += 2 * tokens * (3 * hidden**2 + 3 * hidden * text_mlp) + 4 * hidden * tokens * (tokens + 1) / 2
        return flops

    # k = 2 of 4 layers; R2 = ceil(4 * 71 / (3 * 2 + 2)) = 36, R1 = 108
    expected = prefill([merged] * 4) / prefill([108, 108, 36, 36])
    row = next(x for x in read(benchmark) if (x["model"], x["metric"]) == ("qwen2_5_vl", "prefill"))
    assert float(row["limit"]) == pytest.approx(expected, rel=1e-3)


def test_benchmark_on_a_gpu_is_the_script_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own options, which are not this one's."""
    import benchmark

    called = []
    script = types.SimpleNamespace(main=lambda: called.append(sys.argv))
    monkeypatch.setitem(sys.modules, "benchmark_gpu", script)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cuda", "--seconds", "60"])
    benchmark.main()
    assert called == [["benchmark.py", "--device", "cuda", "--seconds", "60"]]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--seconds", "60"])
    with pytest.raises(SystemExit):
        benchmark.main()


@pytest.mark.parametrize("kind", ["llava", "llava_next", "qwen2_5_vl"])
@torch.inference_mode()
def test_the_gpu_s_benchmark_compares_like_with_like(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a pretended GPU: tower and layers in graphs for the stock model, too, with the same logits; rows of all."""
    import benchmark_gpu

    with torch.inference_mode(False), torch.no_grad():
        model = benchmark_gpu.build(kind, "cpu").float()
        inputs = benchmark_gpu.prompt(model, kind)
    with pretended_gpu(monkeypatch, model):
        given = on_gpu({name: x.float() if x.is_floating_point() else x for name, x in inputs.items()})
        monkeypatch.setattr(benchmark_gpu, "synchronize", lambda device: None)
        logits, _ = benchmark_gpu.stock_graphs(model, kind, given)()
        length = given["input_ids"].shape[1]
        plain = (
            {"position_ids": torch.arange(length, device=model.device).expand(3, 1, length)} if "qwen" in kind else {}
        )
        torch.testing.assert_close(logits, model(**given, **plain, logits_to_keep=1).logits)
        sheet = benchmark_gpu.Sheet(tmp_path / "rows.csv", 60, "cpu")
        sheet.setting = {"model": kind, "visual_tokens": 0, "kept": 4, "batch": 1, "scorer": "diversity"}
        benchmark_gpu.prefills(sheet, model, given, {"tokens": 32}, kind, 3, graphs=True)
        sheet.file.close()
    rows = {(row["metric"], row["variant"]): float(row["value"]) for row in read(tmp_path / "rows.csv")}
    for variant in ("stock", "stock graphs", "patched", "patched graphs"):
        assert rows["prefill", variant] > 0
    assert rows["stage1 kept alike, eager and graphs", "patched graphs"] == 1
    assert rows["stage2 kept alike, eager and graphs", "patched graphs"] == 1


@pytest.mark.long  # half a minute
def test_benchmark_plot_needs_only_the_file(benchmark: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.csv"
    copy.write_text(benchmark.read_text())
    run("benchmark.py", "--plot", copy)
    assert copy.with_suffix(".png").read_bytes() == benchmark.with_suffix(".png").read_bytes()


@pytest.mark.long
def test_benchmark_profile_accounts_for_the_patch(tmp_path: Path) -> None:
    path = tmp_path / "profile.csv"
    run("benchmark.py", "--quick", "--profile", "--output", path)
    rows = [row for row in read(path) if (row["budget"], row["scorer"], row["batch"]) == ("64", "diversity", "1")]
    patched = {row["metric"]: float(row["patched"]) for row in rows}
    unpatched = {row["metric"]: float(row["unpatched"]) for row in rows}
    for part in ("vision_tower", "projector", "decoder layers 1-2", "decoder layers 3-4", "lm_head"):
        assert patched[part] > 0
        assert unpatched[part] > 0
    for part in ("selection", "scoring", "patch, before_layer"):
        assert patched[part] > 0
        assert unpatched[part] == 0


def pruner(folder: Path, seed: int) -> Path:
    """Stage-1 weights of the testbed model's width, untrained."""
    torch.manual_seed(seed)
    lp_patch.LearnablePruner(192, 16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> evaluate.Testbed:
    weights = {"seed0": pruner(tmp_path_factory.mktemp("pruner"), 0)}
    torch.manual_seed(0)
    for own in (SlotPruner(192, 32, 16), MergingPruner(192, 16, 24)):
        weights[own.kind] = tmp_path_factory.mktemp(own.kind)
        own.save_pretrained(weights[own.kind])
    return evaluate.Testbed(retention.TESTBED / "model", weights, ("seen_styles",), limit=2)


@pytest.fixture(scope="module")
def plain() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(retention.TESTBED / "model", dtype=torch.float32).eval()


def cells() -> list[Cell]:
    """Every strategy once, at 32 tokens where that is possible."""
    found = [x for x in evaluate.main_group([base("learned", "seed0")]) if x.scorer not in (*retention.BLIND, "oracle")]
    by_text = {x.text_scorer: x for x in found if x.scorer == retention.NO_STAGE_1 and x.tokens == 128}
    by_scorer = [x for x in found if x.tokens == 32 and replace(x, **ALONE) == x]
    by_scorer += [replace(base(x, x), tokens=32) for x in ("oc-vtp", "metacompress")]
    chosen = [replace(x, **(TEXT if number % 2 else ALONE)) for number, x in enumerate(by_scorer)]
    return [Cell("full"), *chosen, *by_text.values()]


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: f"{cell.scorer}-{cell.text_scorer}")
@torch.no_grad()
def test_evaluation_equals_the_plain_path(
    cell: Cell, testbed: evaluate.Testbed, plain: LlavaForConditionalGeneration
) -> None:
    """Remembered pictures that share stage 1: the answers and the tokens kept of one ordinary generate()."""
    texts, trace = testbed.answer(cell, "seen_styles", 0)
    processor = AutoProcessor.from_pretrained(retention.TESTBED / "model")
    asked = testbed.batches["seen_styles"][0].asked
    pictures = [Image.open(retention.TESTBED / "evaluation" / "pictures" / x["picture"]).convert("RGB") for x in asked]
    prompts = [f"USER: <image>\n{x['question']} ASSISTANT:" for x in asked]
    inputs = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
    given = evaluate.options(cell)
    if cell.pruner:
        given["pruner"] = testbed.pruners[cell.pruner]
    patch = lp_patch.apply(plain, **given) if given else None
    try:
        output = plain.generate(**inputs, max_new_tokens=3, do_sample=False)
        want = patch.trace if patch else None
    finally:
        lp_patch.remove(plain)
    new = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == [text.strip() for text in new]
    if want is not None:
        assert [x is None for x in trace.mixtures] == [cell.scorer != "metacompress"] * len(texts)
        for name in ("stage1", "stage2"):
            assert [x.tolist() for x in getattr(trace, name)] == [x.tolist() for x in getattr(want, name)]


def test_evaluation_without_stage_1_keeps_to_the_budget(testbed: evaluate.Testbed) -> None:
    found = [x for x in evaluate.main_group([]) if x.scorer == retention.NO_STAGE_1]
    assert {(x.text_scorer, x.tokens) for x in found} == {(x, t) for x in strategies.TEXT_SCORERS for t in (192, 128)}
    row = testbed.measure(found[-1], "seen_styles")
    assert row["foreground_recall"] == 1
    assert found[-1].tokens <= row["average"] < found[-1].tokens + 1


def test_visionzip_is_the_plain_cls(testbed: evaluate.Testbed) -> None:
    """The plot draws one line for both."""
    rows = [testbed.measure(replace(base(name), tokens=32), "seen_styles") for name in ("cls", "visionzip")]
    assert rows[0] == rows[1]


def test_every_cell_of_the_evaluation_is_a_valid_configuration() -> None:
    for group in evaluate.GROUPS.values():
        for cell in group([base("learned", "seed0")]):
            given = {name: value for name, value in evaluate.options(cell).items() if name != "pruner"}
            if given:
                lp_patch.PruningConfig(**given)
                assert given["scorer"] in (*strategies.SCORERS, "oracle")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation")
    for seed in (0, 1):
        pruner(path / f"seed{seed}", seed)
    return path


def run_evaluation(folder: Path) -> str:
    """The ladder at 8 tokens on one picture, with two pruners."""
    pruners = [f"seed{seed}={folder / f'seed{seed}'}" for seed in (0, 1)]
    few = ("--groups", "ladder", "--budgets", 8, "--limit", 1, "--splits", "seen_styles", "--pruners", *pruners)
    return run("evaluate.py", *few, "--output", folder / "evaluation.csv")


@pytest.mark.long  # half a minute
def test_evaluation_resumes(evaluation: Path) -> None:
    assert "6 cells, 6 to measure" in run_evaluation(evaluation)
    first = read(evaluation / "evaluation.csv")
    assert [row["scorer"] for row in first] == ["full", "cls", *["learned"] * 4]
    for row in first:
        answers = retention.bits(row)
        assert len(answers) == int(row["n"])
        assert answers.sum() == int(row["correct"])
        assert float(row["accuracy"]) == pytest.approx(answers.mean(), abs=1e-4)
        assert float(row["low"]) <= float(row["accuracy"]) <= float(row["high"])
        assert float(row["relative"]) == pytest.approx(int(row["correct"]) / int(first[0]["correct"]), abs=1e-4)
        assert all(row[x] for x in ("device", "torch", "transformers", "lp_patch", "model_sha256", "date", "command"))
        assert bool(row["pruner_sha256"]) == (row["scorer"] == "learned")
    # other weights under an old label: only their cells are measured, and take the place of the old ones
    pruner(evaluation / "seed1", 2)
    output = run_evaluation(evaluation)
    assert "6 cells, 2 to measure" in output
    second = read(evaluation / "evaluation.csv")
    changed = {row["pruner"] for row, before in zip(second, first, strict=True) if row != before}
    assert changed == {"seed1"}
    assert "| learned |" in output
    assert "[" in next(line for line in output.splitlines() if line.startswith("| learned |"))
    check_figure(evaluation / "evaluation.png")


def test_evaluation_refuses_what_would_mislead(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        (["--limit", "1"], "--limit needs --output"),
        (["--groups", "training"], "has no cell here"),
        (["--pruners", "seed0=nowhere"], "is not LABEL=FOLDER"),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            evaluate.main()
        assert message in f"{caught.value} {capsys.readouterr().err}"


def test_intervals_of_the_evaluation() -> None:
    generator = np.random.default_rng(0)
    full = (generator.random(1030) < 0.9).astype(np.float32)
    correct = full * (generator.random(1030) < 0.8)
    assert retention.relative(full, full) == (1, 1, 1)
    share, low, high = retention.relative(correct, full)
    assert share == pytest.approx(correct.sum() / full.sum())
    # the delta method for a ratio of paired means
    deviation = (correct - share * full).std() / full.mean() / math.sqrt(1030)
    assert (low, high) == pytest.approx((share - 1.96 * deviation, share + 1.96 * deviation), abs=2e-3)
    gap, low, high = retention.difference(correct, full)
    deviation = (correct - full).std() / math.sqrt(1030)
    assert (low, high) == pytest.approx((gap - 1.96 * deviation, gap + 1.96 * deviation), abs=2e-3)
    assert retention.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert retention.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)


@pytest.mark.parametrize("n", [1, 8, 1030])
def test_answers_survive_the_file(n: int) -> None:
    correct = [bool(x) for x in np.random.default_rng(n).integers(0, 2, n)]
    assert retention.bits({"n": str(n), "answers": retention.to_hex(correct)}).tolist() == correct


def test_seeds_are_one_family() -> None:
    for label, family in (("seed0", "learned"), ("kl-seed12", "kl"), ("share5_seed1", "share5"), ("odd", "odd")):
        assert base("learned", label).family == base("learned", family)


def test_every_group_of_the_evaluation_has_its_table(tmp_path: Path) -> None:
    learned = [base("learned", label) for label in ("seed0", "seed1", "x-seed0")]
    cells = {cell for group in evaluate.GROUPS.values() for cell in group(learned)} | {Cell("full")}
    drawn = np.random.default_rng(0).random(1030)
    rows = []
    for cell in cells:
        correct = [bool(x) for x in drawn < 0.5 + 0.4 * min(1, cell.tokens / 192)]
        row = {**dict.fromkeys((*retention.TYPES, "accuracy", "low", "high"), str(np.mean(correct))), "n": "1030"}
        own = {"split": "seen_styles", "answers": retention.to_hex(correct), "average": str(cell.tokens)}
        own |= {name: "" if value is None else str(value) for name, value in vars(cell).items()}
        rows.append({**dict.fromkeys(retention.COLUMNS, ""), **row, **own})
    retention.complete(rows)
    results = retention.Results(rows)
    text = retention.testbed_tables(results)
    for title in (
        "no picture",
        "Accuracy",
        "Differences",
        "(k)",
        "R1 : R2",
        "Share of diversity",
        "Who asks",
        "Ways of",
    ):
        assert any(line.startswith("###") and title in line for line in text.splitlines()), title
    assert "nan" not in text
    # two seeds of the paper's pruner are one line, the variant is another
    assert text.count("| learned, 64 |") + text.count("| learned, 64.0 |") >= 6
    assert "| seed0" not in text
    assert "| x | " in text
    assert "| covering, x | " in text
    # equal answers at 192 tokens: nothing lost against the full model, and no doubt about it
    assert results.text("seen_styles", replace(base("cls"), tokens=192)).endswith(" / 100.0 (100.0–100.0)")
    retention.plot(results, tmp_path / "plot.png")
    check_figure(tmp_path / "plot.png")


@pytest.mark.parametrize("readme", retention.PAGES, ids=lambda path: path.stem)
def test_tables_of_the_evaluation_are_those_of_the_files(readme: Path) -> None:
    text = readme.read_text()
    assert retention.filled(text) == text, "run examples/evaluate.py --tables"


@pytest.mark.parametrize("study", retention.STUDIES.values(), ids=retention.STUDIES.keys())
def test_every_table_of_the_evaluation_has_its_place(study: retention.Study) -> None:
    texts = "".join(readme.read_text() for readme in retention.PAGES)
    for name, make in study.tables.items():
        assert texts.count(f"<!-- {name} -->") == 1
        assert "| covering |" in make(study.results())


# ------------------------------------------------------------------ the larger language model


def test_questions_that_share_a_picture_are_asked_as_if_alone() -> None:
    """`smollm.forward`, on the testbed's own model, against the stock forward of single questions."""
    sys.path.insert(0, str(retention.TESTBED))
    import network
    import questions
    import smollm

    model = LlavaForConditionalGeneration.from_pretrained(retention.TESTBED / "model", dtype=torch.float32).eval()
    words = network.tokenizer()
    asker = smollm.Asker(model, words)
    texts = [
        ("Is there a cat in the image?", "no"),
        ("Where is the sign?", "top left"),
        ("How many bees are there?", "2"),
    ]
    asked = [[questions.Question("", *text, (), "") for text in texts], [questions.Question("", *texts[1], (), "")]]
    ids, targets = asker.batch(asked)
    pixels = torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    everything = torch.arange(576).expand(2, -1)
    with torch.no_grad():
        features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        visual = model.model.multi_modal_projector(features)
        hidden = smollm.forward(model, asker, visual, everything, ids)
        logits = model.lm_head(hidden)
        for row, some in enumerate(asked):
            for column, question in enumerate(some):
                given = words(
                    f"USER: {'<image>' * 576}\n{question.text} ASSISTANT: {question.answer}", return_tensors="pt"
                )
                want = model(**given, pixel_values=pixels[row : row + 1]).logits[
                    0, -len(given.input_ids[0]) + 3 + 576 :
                ]
                torch.testing.assert_close(logits[row, column, : len(want)], want, rtol=1e-4, atol=1e-4)
                at = targets[row, column] >= 0
                assert words.decode(targets[row, column][at][:-1]).replace("##", "") == question.answer
                assert at.nonzero().flatten()[-1] == len(want) - 1
        loss, hits = smollm.answer(model, hidden, targets)
    assert loss.isfinite() and hits.shape == (2, 3)


def test_the_shipped_lora_is_merged_and_goes_with_the_shipped_pruner() -> None:
    folder = retention.TESTBED / "model"
    lora = folder / "lp_patch_pruner" / "lora"
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    healed = evaluate.Testbed(folder, {}, ("seen_styles",), limit=1, lora=lora).model
    name = "model.language_model.layers.3.mlp.up_proj"
    weights, settings = load_file(lora / evaluate.LORA), json.loads((lora / "adapter_config.json").read_text())
    down, up = (weights[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    change = up @ down * settings["lora_alpha"] / settings["r"]
    assert change.abs().max() > 1e-3
    want = model.get_submodule(name).weight + change
    torch.testing.assert_close(healed.get_submodule(name).weight, want, rtol=0, atol=1e-6)

    tuned, processor = PeftModel.from_pretrained(model, str(lora)), AutoProcessor.from_pretrained(folder)
    demo = json.loads(QUESTIONS.read_text())
    with Image.open(QUESTIONS.with_name(demo["picture"])) as picture:
        picture = picture.convert("RGB")
    texts = [f"USER: <image>\n{x['question']} ASSISTANT:" for x in demo["questions"]]
    inputs = processor(images=[picture] * len(texts), text=texts, padding=True, return_tensors="pt")
    with lp_patch.applied(tuned, tokens=32, scorer="covering") as patch, torch.no_grad():
        out = tuned.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert all(len(kept) < 576 for kept in patch.trace.stage1)
    said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [x.strip() for x in said] == [x["answer"] for x in demo["questions"]]


def test_captions_and_their_score() -> None:
    """A long answer names every thing in reading order and its corner where it lies in one; F1 counts what is named."""
    sys.path.insert(0, str(EXAMPLES / "testbed"))
    try:
        from long_answers import f1
        from questions import caption
    finally:
        sys.path.pop(0)
    things = [
        {"kind": "panda", "box": [300, 300, 330, 330]},
        {"kind": "sign", "box": [10, 20, 60, 60], "colour": "red"},
        {"kind": "tent", "box": [150, 20, 190, 60]},  # on the line between left and right
        {"kind": "panda", "box": [250, 300, 290, 330]},
    ]
    said = caption(things).answer
    assert said == "red sign top left, tent, panda bottom right, panda bottom right"
    assert f1(said, said) == 1
    assert f1("panda bottom right", said) == pytest.approx(2 * 1 / (1 + 4)), "one of two pandas, none of the others"
    assert f1("cat", said) == 0
