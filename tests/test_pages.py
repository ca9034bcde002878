"""What the pages under docs/ say runs: Python on the testbed's model, shell commands from the repository's root."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import lp_patch
from lp_patch.cli import main
from lp_patch.loading import ask

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("pictures", "command_line", "harness")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", [code for page in PAGES for code in blocks(page, "python")])
def test_snippets(code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = ROOT / "examples" / "testbed"
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder / "model")
    picture = Image.open(folder / "demo.png").convert("RGB")
    names = {"model": model, "processor": processor, "picture": picture}
    exec(code, {**names, "inputs": ask(processor, picture, "Where is the apple?")})
    assert capsys.readouterr().out
    assert not lp_patch.is_applied(model)
    for path in re.findall(r'"(\w+\.png)"', code):
        assert (tmp_path / path).exists(), path


@pytest.mark.parametrize("command", [x.strip() for page in PAGES for x in blocks(page, "sh")])
def test_commands(command, capsys, tmp_path, monkeypatch):
    name, *arguments = shlex.split(command)
    assert name == "lp-patch"
    placed = [str(ROOT / x) if (ROOT / x).exists() and "/" in x else x for x in arguments]
    monkeypatch.chdir(tmp_path)
    assert main(placed) == 0
    assert capsys.readouterr().out


def test_every_public_name_is_on_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^        - (\w+)$", page, re.MULTILINE)
    alone = re.findall(r"^::: lp_patch\.(\w+)\.\1$", page, re.MULTILINE)
    assert sorted([*listed, *alone, "__version__"]) == sorted(lp_patch.__all__)


def test_files_exist():
    for page in PAGES:
        text = (ROOT / "docs" / f"{page}.md").read_text()
        for path in re.findall(r"(?:examples|tests|adapters|lp_patch|docs)/[\w/.-]+\w", text):
            assert (ROOT / path).exists(), path
