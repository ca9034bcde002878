"""What the documents say is so: snippets run, tables come from the files, names, links and commands exist."""

import ast
import configparser
import dataclasses
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny import batch, images, tiny_llava, tokens
from transformers import AutoProcessor, LlavaForConditionalGeneration

import lp_patch.strategies
import lp_patch.training

ROOT = Path(__file__).resolve().parent.parent
PAGES = {x.relative_to(ROOT).as_posix(): x.read_text() for x in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
# pages whose snippets need more than a model and its inputs: the test file that runs them
ELSEWHERE = {
    "docs/calibrate.md": "tests/test_calibrate.py",
    "docs/neighbours.md": "tests/test_neighbours.py",
    "docs/pictures.md": "tests/test_pages.py",
}


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def here():
    """(page, number of the block, code) of the snippets that this file runs."""
    found = [(page, *x) for page in PAGES if page not in ELSEWHERE for x in enumerate(blocks(PAGES[page], "python"))]
    return [pytest.param(code, id=f"{Path(page).stem}-{number}") for page, number, code in found]


def conversation():
    """A picture and two turns."""
    picture = Image.new("RGB", (336, 336), (200, 30, 30))
    first = [{"type": "image", "image": picture}, {"type": "text", "text": "Is there a cat in the image?"}]
    answer = [{"type": "text", "text": "no"}]
    second = [{"type": "text", "text": "Where is the sign?"}]
    turns = zip(("user", "assistant", "user"), (first, answer, second), strict=True)
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("code", here())
def test_snippets(code, capsys, monkeypatch):
    """vLLM is stood in for: tests/serving asks it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda model, hf_overrides: print(hf_overrides)))
    model = tiny_llava(dtype=torch.float32)
    names = {"model": model, "inputs": batch([tokens(3, "image", 9)], images(1, dtype=torch.float32))}
    if "processor" in code:
        folder = ROOT / "examples" / "testbed" / "model"
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        names = {"model": model, "processor": AutoProcessor.from_pretrained(folder), "conversation": conversation()}
    exec(code, names)
    assert capsys.readouterr().out
    assert not lp_patch.is_applied(model)


def test_snippets_elsewhere_are_run_there():
    for page in ELSEWHERE.keys() & PAGES:
        assert Path(page).stem in (ROOT / ELSEWHERE[page]).read_text(), page


def test_tables_are_those_of_the_files(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import tables

    for page, text in PAGES.items():
        assert tables.fill(text) == text, f"{page}: run examples/tables.py"
    for name in tables.SECTIONS:
        assert sum(f"<!-- {name} -->" in text for text in PAGES.values()) == 1, name


def test_readme_is_short():
    readme = PAGES["README.md"]
    assert readme.count("\n") <= 150
    prose = re.sub(r"```.*?```|^\|.*?$|<!--.*?-->|\]\(.*?\)", " ", readme, flags=re.DOTALL | re.MULTILINE)
    assert len(re.findall(r"[A-Za-z]{2,}", prose)) <= 350  # read aloud in two minutes, code and tables apart


def test_readme_counts_and_names_the_models():
    section = PAGES["README.md"].split("## Models")[1].split("##")[0].replace("\n", " ")
    count, theirs, names = re.search(
        r"(\d+) model types, (\d+) of transformers and LLaVA's own, among them (.*?)\. Each", section
    ).groups()
    supported = lp_patch.supported()
    assert (int(count), int(theirs)) == (len(supported), len(supported.keys() - {"llava_llama"}))
    assert set(re.split(", | and ", names)) <= set(supported.values())


def test_options_are_the_fields():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", PAGES["docs/options.md"], re.MULTILINE)
    assert [name for name, _ in rows] == [field.name for field in dataclasses.fields(lp_patch.PruningConfig)]
    default = lp_patch.PruningConfig()
    for name, text in rows:
        assert eval(text) == getattr(default, name), name


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_files_and_targets_exist(page):
    text = (ROOT / page).read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"`((?:examples|tests|adapters|lp_patch)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_every_module_is_in_the_tree():
    tree = PAGES["docs/how_it_works.md"].split("lp_patch/\n")[1].split("```")[0]
    listed = set(re.findall(r"(\w+\.py)", tree))
    assert listed == {path.name for path in (ROOT / "lp_patch").glob("*.py") if not path.name.startswith("_")}


# ---------------------------------------------------------------------- shell commands


def commands():
    """(page, words) of every command in a block of shell, comments left out."""
    for page, text in {**PAGES, "CONTRIBUTING.md": CONTRIBUTING}.items():
        for block in blocks(text, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = [x for x in shlex.split(line, comments=True) if not re.match(r"[A-Z]+=", x)]
                if words:
                    yield pytest.param(words, id=f"{Path(page).stem}: {shlex.join(words)[:60]}")


def extras():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["options.extras_require"], setup["options"]["install_requires"]


@pytest.mark.parametrize("words", list(commands()))
def test_commands(words, capsys, monkeypatch):
    """Each command is one that we know, and what it names exists: targets, extras, scripts and their flags."""
    monkeypatch.chdir(ROOT)
    program, *rest = words
    flags = {word.partition("=")[0] for word in rest if word.startswith("--")}
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        assert targets
        for target in targets:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    elif program == "pip":
        assert rest[0] == "install"
        wanted = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        assert {name for names in wanted for name in names.split(",")} <= set(extras()[0])
    elif program == "python" and rest[0].endswith(".py"):
        assert (ROOT / rest[0]).exists(), rest[0]
        if flags:
            assert flags <= helped(rest, capsys, monkeypatch)
    elif program == "lp-patch":
        assert flags <= helped(["lp_patch/__main__.py", *rest], capsys, monkeypatch)
    else:
        raise AssertionError(f"a command that this test does not know: {shlex.join(words)}")


def helped(words, capsys, monkeypatch):
    """The flags that a script, or the subcommand of it that these words begin with, names when asked for help."""
    start = list(takewhile(lambda word: not word.startswith("-"), words))
    monkeypatch.setattr(sys, "argv", [*start, "--help"])
    monkeypatch.syspath_prepend((ROOT / start[0]).parent)
    with pytest.raises(SystemExit) as stop:
        if start[0].startswith("lp_patch"):
            runpy.run_module("lp_patch", run_name="__main__")
        else:
            runpy.run_path(start[0], run_name="__main__")
    assert stop.value.code == 0
    return set(re.findall(r"--[\w-]+", capsys.readouterr().out))


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
    optional, required = extras()
    pattern = r"pip install \"?\.(?:\[(\w+)\])?\"?\s+python (examples/\w+\.py)"
    lines = [found for text in PAGES.values() for found in re.findall(pattern, text)]
    assert {script for _, script in lines} == {"examples/quickstart.py", "examples/train_pruner.py"}
    for extra, script in lines:
        enough = required + (optional[extra] if extra else "")
        assert imported(ROOT / script) <= set(re.findall(r"^[\w-]+", enough, re.MULTILINE)), script


# ---------------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site, and what was complained of."""
    assert importlib.util.find_spec("mkdocs"), 'the site needs the extra "docs": pip install ".[docs]"'
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", folder], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    warned = [x for x in done.stderr.splitlines() if x.startswith(("WARNING", "ERROR"))]
    return folder, warned


def test_the_site_builds_without_a_warning(site):
    """As `mkdocs build --strict` would: dead links, anchors, pages that no menu has."""
    folder, warned = site
    assert not warned
    for page in PAGES:
        name = page.removesuffix("README.md").removesuffix("index.md").removesuffix(".md")
        assert (folder / name / "index.html").is_file(), page


def test_tables_and_pictures_of_a_page_are_those_of_the_site(site):
    folder, _ = site
    for page, text in PAGES.items():
        name = page.removesuffix("README.md").removesuffix("index.md").removesuffix(".md")
        html = (folder / name / "index.html").read_text()
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        assert html.count("<table>") == len(re.findall(r"^\|[-|: ]+\|$", prose, re.MULTILINE)), page
        assert html.count("<img alt") == len(re.findall(r"!\[", prose)), page
        for source in re.findall(r'<img [^>]*src="([^"]+)"', html):
            found = (folder / name / source).resolve()
            assert found.is_file(), (page, source)


def test_every_public_name_is_on_the_page_of_the_api(site):
    folder, _ = site
    html = (folder / "docs" / "api" / "index.html").read_text()
    shown = {name.rpartition(".")[2] for name in re.findall(r'id="(lp_patch[\w.]+)"', html)}
    for module in (lp_patch, lp_patch.strategies, lp_patch.training):
        assert {name for name in module.__all__ if callable(getattr(module, name))} <= shown


def test_every_cell_of_the_tables_is_a_test():
    import matrix

    for test in {test for tests in (*matrix.ROWS.values(), *matrix.ASKED.values()) for test in tests}:
        file, name = test.split("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(), test
    families = matrix.families(lp_patch.supported())
    for wrong in ("**no**", "not tried", "partly tried"):
        assert wrong not in families + matrix.table()
    assert families.count(" yes ") > 200
