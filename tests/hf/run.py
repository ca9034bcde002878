"""transformers' own model tests, on stock and on patched models: what the patch breaks must be listed with a reason.

The tests are the ModelTesterMixin in the source distribution of the transformers that is installed, fetched from the
package index; its generation mixin and its families' own files are not in there. Three runs over our tiny families:
stock; at full budget, where a failure that the stock model does not have and `KNOWN` does not list makes this script
fail; and pruned, for information, since a test that compares outputs may rightly see a difference.

    python tests/hf/run.py [family ...]
"""

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "mistral3", "video_llava"]
RUNS = {"stock": "", "full budget": "1.0", "pruned": "0.5"}

# test of any family -> why it fails at full budget
KNOWN = {
    "test_attn_implementation_composite_models": "it reads the back-end's name in each layer's config, and the layer "
    "from which stage 2 reads shows the tap's, which ends in that name; the model's config is as it was",
}


def fetch(folder):
    """The tests of the installed version, in `folder`, fetched once."""
    wanted, tests = f"transformers=={version('transformers')}", folder / "tests"
    if not (tests / "__init__.py").exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*pip, "--dest", str(folder), wanted], check=True)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as source:
            for member in source:
                path = Path(member.name)
                if path.parts[1:2] == ("tests",) and path.suffix == ".py":
                    member.name = str(Path(*path.parts[1:]))
                    source.extract(member, folder, filter="data")
        (tests / "__init__.py").touch()


def run(name, families, folder):
    """Test -> outcome of one run."""
    out = folder / f"{name.replace(' ', '_')}.json"
    out.unlink(missing_ok=True)
    paths = [folder, HERE, HERE.parents[1]]
    env = {
        **os.environ,
        "LP_PATCH_HF_RATIO": RUNS[name],
        "LP_PATCH_HF_FAMILIES": " ".join(families),
        "LP_PATCH_HF_OUTCOMES": str(out.resolve()),
        "PYTHONPATH": os.pathsep.join(str(path.resolve()) for path in paths),
        "OMP_NUM_THREADS": "1",  # tiny models run many times slower with more
        "HF_HUB_OFFLINE": "1",
    }
    with out.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "-p", "outcomes", str(HERE)]
        subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not out.exists():
        raise SystemExit(f"the run {name!r} did not end: see {out.with_suffix('.log')}")
    return json.loads(out.read_text())


def main(families):
    folder = Path("runs/hf") / version("transformers")
    folder.mkdir(parents=True, exist_ok=True)
    fetch(folder)
    outcomes = {name: run(name, families, folder) for name in RUNS}
    if not outcomes["stock"] or any(x.keys() != outcomes["stock"].keys() for x in outcomes.values()):
        raise SystemExit(f"the runs did not see the same tests, or none: see the logs in {folder}")
    for name, seen in outcomes.items():
        for family in families:
            count = Counter(what for test, what in seen.items() if test.startswith(f"Test_{family}::"))
            print(f"{family:12} {name:12}", *(f"{count[what]:4} {what}" for what in ("passed", "failed", "skipped")))
    new = {
        name: sorted(x for x, what in seen.items() if what == "failed" != outcomes["stock"][x])
        for name, seen in outcomes.items()
    }
    known = [test for test in new["full budget"] if test.split("::")[1] in KNOWN]
    unlisted = sorted(set(new["full budget"]) - set(known))
    for title, tests in (
        ("fails when pruned alone, for reading", sorted(set(new["pruned"]) - set(new["full budget"]))),
        ("fails at full budget, with a reason in KNOWN", known),
        ("FAILS AT FULL BUDGET, without one", unlisted),
    ):
        print(title, *(tests or ["-"]), sep="\n  ")
    stale = KNOWN.keys() - {test.split("::")[1] for test in known}
    if stale:
        print("listed in KNOWN, but no failure: take it off, or the patch was not on:", *sorted(stale))
    return 1 if unlisted or stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or FAMILIES))
