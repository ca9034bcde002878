"""The command line: each command's answer, its help, and what it refuses."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor

import lp_patch
from lp_patch import bench
from lp_patch.cli import main
from lp_patch.errors import UnsupportedInputError
from lp_patch.training.data import _message, prompts

TESTBED = Path(__file__).resolve().parent.parent / "examples" / "testbed"
MODEL, PICTURE = str(TESTBED / "model"), str(TESTBED / "demo.png")


def test_check(capsys):
    assert main(["check", MODEL, "--tokens", "64"]) == 0
    printed = capsys.readouterr().out
    assert "pruned equals masked" in printed
    assert "of 576 visual tokens: 117 in decoder layers 1 to 2, 39 in 3 to 6" in printed


def test_bench(capsys, tmp_path):
    """A fixed tower sees as many tokens in a smaller picture; the CSV has what the table has, and the command."""
    path = tmp_path / "new" / "bench.csv"
    shared = ["--image", PICTURE, "--runs", "1", "--new-tokens", "2", "--tokens", "32", "--csv", str(path)]
    assert main(["bench", MODEL, *shared]) == 0
    printed = capsys.readouterr().out
    assert "a smaller picture has as many tokens, to this processor" in printed
    with path.open(newline="") as file:
        stock, patched = csv.DictReader(file)
    assert (stock["way"], float(stock["tokens"])) == ("stock", 576)
    assert patched["way"] == "patched" and 31 < float(patched["tokens"]) < 34
    assert float(patched["cache"]) < 0.15 * float(stock["cache"])
    assert (
        0 < float(stock["tower"]) < 1
        and min(float(x["decode"]) for x in (stock, patched)) > 0
        and stock["peak"] == ""
        and stock["command"]
    )
    assert float(stock["prefill"]) > float(patched["prefill"]) / 2


@pytest.mark.filterwarnings("ignore:compile=True captures CUDA graphs")
def test_bench_compiled(capsys, tmp_path):
    """The option reaches the patch; inside a captured region the tower has no clock of its own."""
    path = tmp_path / "bench.csv"
    shared = ["--image", PICTURE, "--runs", "1", "--new-tokens", "2", "--tokens", "32", "--csv", str(path)]
    assert main(["bench", MODEL, *shared, "--compile"]) == 0
    with path.open(newline="") as file:
        stock, patched = csv.DictReader(file)
    assert float(stock["tower"]) > 0 and float(patched["tower"]) == 0


def test_calibrate(capsys, tmp_path):
    """Settings from a file of conversations: `apply` takes the folder, the plot is drawn."""
    data, shared = tmp_path / "asked.json", ["--images", str(TESTBED), "--tokens", "32", "--answer-tokens", "2"]
    questions = ["Where is the apple?", "Is there a dog?", "How many hamburgers are there?"]
    turns = [[{"from": "human", "value": f"<image>{'?' * n} {x}"}] for x in questions for n in range(2)]
    turns = [[*x, {"from": "gpt", "value": "no"}, {"from": "human", "value": "Sure?"}] for x in turns]
    data.write_text(json.dumps([{"image": "demo.png", "conversations": x} for x in turns]))
    folder, plot = tmp_path / "settings", tmp_path / "plot.png"
    given = ["calibrate", MODEL, str(data), *shared, "--output", str(folder), "--plot", str(plot), "--batch", "4"]
    assert main([*given, "--prompts", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("5 prompts are too few") == 1
    assert "tokens=32, 5 prompts" in printed and "stage 1 alone" in printed
    assert lp_patch.PruningConfig.load(folder).tokens == 32
    assert plot.stat().st_size > 5000


def test_prompts_are_what_is_asked_first():
    """Padded on the left, so that an answer can follow; of what comes after the first question nothing is there."""
    turns = ["where is the red apple ?", "where ?"]
    turns = [[{"from": "human", "value": f"<image> {x}"}, {"from": "gpt", "value": "banana"}] for x in turns]
    messages = [[_message(x) for x in some] for some in turns]
    samples = [{"name": "0", "messages": x, "images": [Image.open(PICTURE)]} for x in (*messages, messages[0])]
    processor = AutoProcessor.from_pretrained(MODEL)
    first, last = prompts(processor, samples, batch=2)
    assert len(first["pixel_values"]) == 2 and len(last["input_ids"]) == 1
    assert first["attention_mask"][:, -1].all() and not first["attention_mask"][1, 0]
    for row, some in zip(first["input_ids"], messages, strict=True):
        said = processor.decode(row, skip_special_tokens=True)
        assert some[0]["content"][1]["text"] in said and said.endswith("assistant :") and "banana" not in said


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        (["gpt: hello", "human: <image> what?"], "sample 0: its first question must show its 1 pictures, not 0"),
        (
            ["human: hello", "gpt: hi", "human: <image> what?"],
            "sample 0: its first question must show its 1 pictures, not 0",
        ),
    ],
)
def test_prompts_begin_with_a_question_about_the_pictures(turns, said):
    """What calibration takes of a conversation shows the picture before the first answer."""
    roles = {"human": "user", "gpt": "assistant"}
    messages = [_message(dict(zip(("from", "value"), x.split(": "), strict=True))) for x in turns]
    assert {x["role"] for x in messages} == set(roles.values())
    with pytest.raises(UnsupportedInputError, match=said):
        list(prompts(None, [{"name": "sample 0", "messages": messages, "images": [None]}]))


def test_show(capsys, tmp_path):
    path = tmp_path / "kept.png"
    assert main(["show", MODEL, PICTURE, "Where is the apple?", str(path), "--tokens", "64"]) == 0
    assert capsys.readouterr().out.startswith("bottom left")
    with Image.open(path) as drawn:
        assert drawn.size[0] > 2000


def test_options_are_those_of_apply(capsys):
    with pytest.raises(SystemExit):
        main(["show", "--help"])
    printed = capsys.readouterr().out
    for field in dataclasses.fields(lp_patch.PruningConfig):
        assert f"--{field.name.replace('_', '-')} " in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", MODEL, "--scorer", "cl"], "invalid choice: 'cl'"),
        (["check", MODEL, "--visual-tokens", "-5"], "a whole number of at least 1, got '-5'"),
        (["check", MODEL, "--settings", "nowhere"], "must be a folder, got 'nowhere'"),
        (["bench", MODEL, "--tokns", "3"], "unrecognized arguments: --tokns 3"),
        (["bench", MODEL, "--runs", "0"], "a whole number of at least 1, got '0'"),
        (["bench", MODEL, "--device", "bogus"], "'bogus' cannot be used"),
        (["bench", MODEL, "--dtype", "int"], "invalid choice: 'int'"),
        (["show", MODEL, PICTURE, "Where?", "kept.txt"], "must end in .png, got 'kept.txt'"),
        (
            ["calibrate", MODEL, "asked.json", "--output", "x", "--rounding", "up"],
            "unrecognized arguments: --rounding up",
        ),
    ],
)
def test_arguments_are_checked_first(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "/nowhere"], "/nowhere"),
        (["bench", MODEL, "--image", "/nowhere.png"], "/nowhere.png"),
        (["bench", MODEL, "--image", __file__], "cannot identify image file"),
        (["show", MODEL, PICTURE, "Where?", "kept.png", "--tokens", "0"], "tokens must be an int >= 1, got 0"),
        (["calibrate", MODEL, "/nowhere.json", "--output", "x"], "/nowhere.json"),
        (["calibrate", MODEL, __file__, "--output", "x"], "is not JSON"),
        (["calibrate", MODEL, "asked.json", "--output", PICTURE], PICTURE),
        (["calibrate", MODEL, "asked.json", "--output", "x", "--plot", "/proc/nowhere/x.png"], "/proc/nowhere"),
    ],
)
def test_errors_are_a_line_and_a_status(arguments, said, capsys, tmp_path, monkeypatch):
    """Found before a model is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lp_patch.cli.load", None)
    sample = {"image": PICTURE, "conversations": [{"from": "human", "value": "<image> what?"}]}
    Path("asked.json").write_text(json.dumps([sample]))
    assert main(arguments) == 2
    told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lp-patch: ")]
    assert len(told) == 1 and said in told[0]


def test_settings_of_a_folder(capsys, tmp_path):
    lp_patch.PruningConfig(tokens=32, layer=4).save(tmp_path)
    assert main(["check", MODEL, "--settings", str(tmp_path), "--stage-ratio", "2"]) == 0
    assert "of 576 visual tokens: 40 in decoder layers 1 to 4, 20 in 5 to 6" in capsys.readouterr().out


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "lp_patch", "--help"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0
    for command in ("check", "bench", "calibrate", "show", "train"):
        assert f"\n    {command}" in done.stdout


@pytest.mark.parametrize(("patch", "found"), [(28, True), (400, False)])
def test_a_smaller_picture_of_as_many_tokens(monkeypatch, patch, found):
    """Found by size where the processor's tokens follow it closely; given up where they cannot come near."""

    def ask(processor, picture, question):
        if min(picture.size) < patch:
            raise ValueError("too small")
        return {"tokens": (picture.size[0] // patch) * (picture.size[1] // patch)}

    monkeypatch.setattr(bench, "ask", ask)
    picture = Image.new("RGB", (1120, 840))
    present = ask(None, picture, "")["tokens"]
    wanted = 64 if found else 3
    smaller = bench._smaller(None, picture, "", wanted, present, lambda inputs: inputs["tokens"])
    if found:
        assert abs(smaller["tokens"] - wanted) <= 0.15 * wanted
    else:
        assert smaller is None
