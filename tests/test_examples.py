"""The example scripts run to their end, and what they print, draw and write is what they say it is."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
QUESTIONS = EXAMPLES / "testbed" / "demo.json"


def run(script: str, *arguments: object) -> str:
    """Run an example as a user would, without a network; its output."""
    # one thread: shapes this small gain nothing from more, which wait for each other where the machine is busy
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
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
    output = run("demo.py", "--runs", 1, "--output", tmp_path / "demo.png")
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
    check_figure(tmp_path / "demo.png")


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "quick.csv"
    run("benchmark.py", "--quick", "--output", path)
    return path


def test_benchmark_rows(benchmark: Path) -> None:
    rows = read(benchmark)
    metrics = {"vision_tower", "prefill", "decode", "generate", "kv_cache", "selection", "scoring", "both_stages"}
    settings = {tuple(row[x] for x in ("visual_tokens", "budget", "batch", "scorer")) for row in rows}
    assert settings == {
        ("576", "64", "1", "diversity"),
        ("576", "32", "1", "learned"),
        ("2880", "160", "1", "diversity"),
        ("576", "64", "4", "diversity"),
        ("576", "576", "1", "diversity"),
    }
    for setting in settings:
        mine = {row["metric"] for row in rows if (row["budget"], row["batch"]) == (setting[1], setting[2])}
        wanted = metrics if setting[1] != "576" else {"vision_tower", "prefill", "decode", "kv_cache"}
        assert mine - {"peak_memory", "working_memory"} == wanted
    for row in rows:
        numbers = [float(row[x]) for x in ("patched", "ratio", "ratio_q1", "ratio_q3")]
        assert all(math.isfinite(x) and x > 0 for x in numbers)
        assert float(row["ratio_q1"]) <= float(row["ratio"]) <= float(row["ratio_q3"])
        assert all(row[x] for x in ("date", "device", "torch", "transformers", "lp_patch", "threads", "dtype", "pairs"))
    assert {row["metric"] for row in rows if "memory" in row["metric"]} == {"peak_memory", "working_memory"}
    check_figure(benchmark.with_suffix(".png"))


def test_benchmark_limit_is_the_closed_form(benchmark: Path) -> None:
    """The counted arithmetic of the tiny model, against the same worked out by hand from its shapes."""
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


def test_benchmark_plot_needs_only_the_file(benchmark: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.csv"
    copy.write_text(benchmark.read_text())
    run("benchmark.py", "--plot", copy)
    assert copy.with_suffix(".png").read_bytes() == benchmark.with_suffix(".png").read_bytes()


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
