"""What users install: the built files, a wheel in a fresh environment, a plain checkout."""

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import lp_patch

ROOT = Path(__file__).parent.parent
IGNORED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "runs", "evaluation", "__pycache__")

ONE_LINER = """
import json, logging, sys, warnings
import torch, transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def state():
    return {
        "attention": sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()),
        "torch": [str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.get_rng_state().sum().item()],
        "threads": torch.get_num_threads(),
        "warnings": repr(warnings.filters),
        "logging": repr(logging.getLogger().handlers),
        "class": sorted(vars(LlavaForConditionalGeneration)),
        "forward": repr(LlavaForConditionalGeneration.forward),
        "path": list(sys.path),
    }

before = state()
import lp_patch, lp_patch.adapters
after = state()

torch.manual_seed(0)
size = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2)
model = LlavaForConditionalGeneration(LlavaConfig(
    vision_config=CLIPVisionConfig(num_hidden_layers=2, image_size=56, patch_size=14, **size),
    # a random model must not stop at random
    text_config=LlamaConfig(num_hidden_layers=4, vocab_size=40, pad_token_id=0, eos_token_id=None, **size),
    image_token_id=1,
)).eval()
prompt = dict(input_ids=torch.tensor([[5] + [1] * 16 + [6, 7]]), pixel_values=torch.randn(1, 3, 56, 56))

patch = lp_patch.apply(model)
text = model.generate(**prompt, max_new_tokens=3, do_sample=False)
tapped = set(state()["attention"]) - set(after["attention"])
print(json.dumps({
    "file": lp_patch.__file__,
    "adapters": lp_patch.adapters.__file__,
    "changed": [name for name in before if before[name] != after[name]],
    "tapped": sorted(tapped),
    "length": text.shape[1],
    "tokens_per_layer": patch.trace.tokens_per_layer,
    "report": str(patch.report()),
}))
"""


def run(*command, cwd, **env):
    """Stdout of a command that must succeed, with nothing of ours in its environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV", "PYTEST"))}
    done = subprocess.run(command, cwd=cwd, env={**clean, **env}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Names of the two files built from a copy of the checkout: the sdist, and the wheel made from that sdist."""
    source = tmp_path_factory.mktemp("built") / "source"
    shutil.copytree(ROOT, source, ignore=IGNORED)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source.parent / "dist", cwd=source)
    sdist, wheel = sorted((source.parent / "dist").iterdir(), key=lambda path: path.suffix)
    return sdist, wheel


@pytest.fixture(scope="module")
def elsewhere(built, tmp_path_factory):
    """An empty working folder, and the Python of a new environment: the wheel, and this one's other packages."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "env", symlinks=True)
    paths = sysconfig.get_paths("venv", vars={"base": str(folder / "env"), "platbase": str(folder / "env")})
    python = Path(paths["scripts"]) / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[1], cwd=folder)
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(paths["purelib"]) / "others.pth").write_text("\n".join(others) + "\n")
    (folder / "work").mkdir()
    return folder / "work", python


def sources():
    """Files of the package, by the name that they have once installed."""
    own = {f"lp_patch/{path.relative_to(ROOT / 'lp_patch').as_posix()}" for path in (ROOT / "lp_patch").rglob("*.py")}
    return own | {f"lp_patch/adapters/{path.name}" for path in (ROOT / "adapters").glob("*.py")} | {"lp_patch/py.typed"}


def metadata(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(file.read(name).decode())


def test_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as file:
        names = set(file.namelist())
    info = f"lp_patch-{lp_patch.__version__}.dist-info"
    assert {name for name in names if not name.startswith(f"{info}/")} == sources()
    assert "lp_patch/adapters/llava.py" in names
    assert f"{info}/licenses/LICENSE" in names


def test_sdist_holds_the_sources(built):
    with tarfile.open(built[0]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    in_checkout = {name.replace("lp_patch/adapters/", "adapters/") for name in sources()}
    assert in_checkout | {"LICENSE", "setup.cfg", "pyproject.toml", "PKG-INFO"} <= names
    assert not {name for name in names if name.startswith(("examples", "runs", ".ci"))}


def test_metadata(built):
    found = metadata(built[1])
    assert (found["Name"], found["Version"]) == ("lp_patch", lp_patch.__version__)
    assert "Apache-2.0" in (found["License"], found["License-Expression"])
    assert found["Author"] == "lp_patch contributors" and "transformers" in found["Keywords"]
    with zipfile.ZipFile(built[1]) as file:
        (name,) = (name for name in file.namelist() if name.endswith("entry_points.txt"))
        points = file.read(name).decode()
    assert "lp-patch = lp_patch.cli:main" in points and "lp_patch = lp_patch.lmms_eval:MANIFEST" in points


def test_every_import_is_declared(built):
    imported = set()
    for path in [*(ROOT / "lp_patch").rglob("*.py"), *(ROOT / "adapters").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    lines = metadata(built[1]).get_all("Requires-Dist")
    declared = {line.partition(">")[0] for line in lines if "extra ==" not in line}
    training = {line.partition(";")[0] for line in lines if 'extra == "train"' in line}
    assert training == {"accelerate", "peft", "pillow"}
    evaluation = {line.partition(">")[0].partition(";")[0] for line in lines if 'extra == "evaluate"' in line}
    assert evaluation == {"matplotlib", "scipy"}
    extras = {"accelerate", "peft", "PIL", *evaluation}
    # triton comes with torch's builds for GPUs, and is asked for there only; lmms-eval and vLLM import what is
    # theirs, and nobody else does; type checkers alone ask for typing_extensions
    others = {"lp_patch", "triton", "lmms_eval", "vllm", "typing_extensions"}
    assert imported - set(sys.stdlib_module_names) - extras - others == declared


def test_installed_wheel_runs_the_one_liner(elsewhere):
    work, python = elsewhere
    got = json.loads(run(python, "-W", "error::UserWarning:lp_patch", "-c", ONE_LINER, cwd=work).splitlines()[-1])
    installed = (work.parent / "env").resolve()
    assert Path(got["file"]).resolve().is_relative_to(installed)
    assert Path(got["adapters"]).resolve().parent == Path(got["file"]).resolve().parent / "adapters"
    assert got["changed"] == []  # an import changes nothing outside lp_patch
    assert got["tapped"] == ["lp_patch_tap|sdpa"]  # the first call makes the tapped attention known
    assert got["length"] == 19 + 3
    # 2/9 of 16 tokens on average over 4 layers, 2 of them on stage 1: ceil(4 * 3.56 / (3 * 2 + 2)) = 2, then 3 * 2
    assert got["tokens_per_layer"] == [[6, 6, 2, 2]]
    assert "16 of 19 tokens visual" in got["report"]


def test_checkout_imports_without_installation(elsewhere):
    work, python = elsewhere
    code = "import lp_patch, lp_patch.adapters.llava as a; print(lp_patch.__file__, a.__file__, sep='\\n')"
    found = run(python, "-c", code, cwd=work, PYTHONPATH=str(ROOT)).splitlines()
    assert [Path(path) for path in found] == [ROOT / "lp_patch" / "__init__.py", ROOT / "adapters" / "llava.py"]


def test_the_folder_adapters_does_not_stand_in_for_the_package_of_that_name():
    code = "try:\n import adapters\nexcept ImportError as error:\n print(error)\nelse:\n raise SystemExit(1)"
    said = run(sys.executable, "-c", code, cwd=ROOT)
    assert said.startswith("this folder is imported as lp_patch.adapters; the PyPI package 'adapters' is something")


def test_public_names():
    assert lp_patch.__all__ == sorted(lp_patch.__all__)
    assert len(set(lp_patch.__all__)) == len(lp_patch.__all__)
    for name in ("apply", "applied", "remove", "is_applied", "supported", "register", "LearnablePruner"):
        assert name in lp_patch.__all__
    for name in lp_patch.__all__:
        assert hasattr(lp_patch, name)
    public = {
        name for name, value in vars(lp_patch).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public <= set(lp_patch.__all__)


def test_every_public_name_says_what_it_is():
    assert lp_patch.__doc__
    for name in lp_patch.__all__:
        thing = getattr(lp_patch, name)
        if not callable(thing):
            continue
        said = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
        assert said, name
        assert not said.startswith(f"{name}("), f"{name}: only what dataclass writes"
        if inspect.isclass(thing):
            for method, value in vars(thing).items():
                if not method.startswith("_") and isinstance(value, (property, classmethod, type(run))):
                    assert inspect.getdoc(value), f"{name}.{method}"
