"""The command line: each command's answer, its help, and what it refuses."""

import csv
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import lp_patch
from lp_patch import bench
from lp_patch.cli import main

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
    assert 0 < float(stock["tower"]) < 1 and stock["peak"] == "" and stock["command"]
    assert float(stock["prefill"]) > float(patched["prefill"]) / 2


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


def test_errors_are_a_line_and_a_status(capsys, tmp_path):
    assert main(["check", MODEL, "--scorer", "cl"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("lp-patch: unknown scorer 'cl'; did you mean 'cls'?")
    with pytest.raises(SystemExit) as stop:
        main(["bench", MODEL, "--tokns", "3"])
    assert stop.value.code == 2


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "lp_patch", "--help"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0
    for command in ("check", "bench", "show", "train"):
        assert f"\n    {command} " in done.stdout


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
