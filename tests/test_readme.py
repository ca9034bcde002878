"""What the documents say is so: snippets run, tables come from the files, names and commands exist."""

import ast
import configparser
import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import batch, images, tiny_llava, tokens
from transformers import AutoProcessor, LlavaForConditionalGeneration

import lp_patch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def conversation():
    """A picture and two turns."""
    picture = Image.new("RGB", (336, 336), (200, 30, 30))
    first = [{"type": "image", "image": picture}, {"type": "text", "text": "Is there a cat in the image?"}]
    answer = [{"type": "text", "text": "no"}]
    second = [{"type": "text", "text": "Where is the sign?"}]
    turns = zip(("user", "assistant", "user"), (first, answer, second), strict=True)
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("code", snippets(README))
def test_snippets_of_the_readme(code, capsys):
    model = tiny_llava(dtype=torch.float32)
    names = {"model": model, "inputs": batch([tokens(3, "image", 9)], images(1, dtype=torch.float32))}
    if "processor" in code:
        folder = ROOT / "examples" / "testbed" / "model"
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        names = {"model": model, "processor": AutoProcessor.from_pretrained(folder), "conversation": conversation()}
    exec(code, names)
    assert capsys.readouterr().out
    assert not lp_patch.is_applied(model)


def test_tables_are_those_of_the_files():
    sys.path.insert(0, str(ROOT / "examples"))
    import tables

    assert tables.fill(README) == README, "run examples/tables.py"


def test_options_are_the_fields():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", README.split("## Options")[1].split("##")[0], re.MULTILINE)
    assert [name for name, _ in rows] == [field.name for field in dataclasses.fields(lp_patch.PruningConfig)]
    default = lp_patch.PruningConfig()
    for name, text in rows:
        assert eval(text) == getattr(default, name), name


def test_commands_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    for text in (README, CONTRIBUTING):
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        for path in re.findall(r"`((?:examples|tests|adapters|lp_patch)/[\w/.-]+)`", text) + re.findall(
            r"\]\(([\w/.]+)\)", text
        ):
            assert (ROOT / path).exists(), path
    tree = README.split("lp_patch/\n")[1].split("```")[0]
    listed = set(re.findall(r"(\w+\.py)", tree))
    assert listed == {path.name for path in (ROOT / "lp_patch").glob("*.py") if not path.name.startswith("_")}


def imported(path):
    """Packages that a file imports, by their names among the requirements."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return {"pillow" if name == "PIL" else name for name in found - set(sys.stdlib_module_names) - {"lp_patch"}}


def test_what_is_installed_is_enough_for_the_script_after_it():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = re.findall(r"pip install \"?\.(?:\[(\w+)\])?\"?.*?python (examples/\w+\.py)", README, re.DOTALL)
    assert [script for _, script in lines] == ["examples/quickstart.py", "examples/train_pruner.py"]
    for extra, script in lines:
        required = setup["options"]["install_requires"] + (extras[extra] if extra else "")
        assert imported(ROOT / script) <= set(re.findall(r"^[\w-]+", required, re.MULTILINE)), script


def test_every_cell_of_the_tables_is_a_test():
    import matrix

    for test in {test for tests in (*matrix.ROWS.values(), *matrix.ASKED.values()) for test in tests}:
        file, name = test.split("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(), test
    families = matrix.families(lp_patch.supported())
    for wrong in ("**no**", "not tried", "partly tried"):
        assert wrong not in families + matrix.table()
    assert families.count(" yes ") > 200
