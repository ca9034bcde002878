"""Put the measured tables into the README, from the CSV files alone: `python examples/tables.py`."""

import csv
import sys
from pathlib import Path

import lp_patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

RESULTS = ROOT / "examples" / "testbed" / "results.csv"
BENCHMARK = ROOT / "examples" / "results" / "benchmark_cpu.csv"
BUDGETS = (192, 128, 64, 32, 16)
METHODS = ("random", "uniform", "cls", "diversity")


def accuracy() -> str:
    """Accuracy relative to all tokens, by method and budget, on the questions in styles that training saw."""
    with RESULTS.open(newline="") as file:
        rows = {
            (x["split"], x["method"], x["stage2"], int(x["tokens"])): x
            for x in csv.DictReader(file)
            if x["type"] == "all"
        }

    def share(row: dict | None) -> str:
        return "-" if row is None else f"{100 * float(row['accuracy']):.1f}"

    lines = []
    for split, title in (("seen_styles", "styles seen in training"), ("unseen_style", "a drawing style never seen")):
        full = rows[split, "full", "no", 576]
        low, high = 100 * float(full["low"]), 100 * float(full["high"])
        blind = share(rows[split, "grey picture", "no", 576])
        lines += [
            f"**{title.capitalize()}**, {full['n']} questions: {share(full)} % with all 576 tokens (95 % interval "
            f"{low:.1f} to {high:.1f}), {blind} % without the picture. Accuracy in % at an average of",
            "",
            "| | " + " | ".join(map(str, BUDGETS)) + " |",
            "|---|" + "---:|" * len(BUDGETS),
        ]
        for stage2, what in (("no", "stage 1 alone"), ("yes", "both stages")):
            for method in METHODS:
                cells = [share(rows.get((split, method, stage2, tokens))) for tokens in BUDGETS]
                lines.append(f"| {method}, {what} | " + " | ".join(cells) + " |")
        lines.append("")
    lines.append(
        "Intervals, question types and seeds: `examples/testbed/README.md` and `results.csv` beside it; "
        "`python examples/testbed/evaluate.py` measures again."
    )
    return "\n".join(lines)


def speed() -> str:
    """Speed-ups, limits and what share of them is reached."""
    with BENCHMARK.open(newline="") as file:
        rows = list(csv.DictReader(file))
    one = rows[0]
    lines = [
        f"`make benchmark` on {one['device']}, {one['threads']} thread(s), {one['dtype']}, random weights; patched and "
        "unpatched alternate in one process; median of the ratios of adjacent pairs. The limit is the ratio of the "
        "arithmetic that is run.",
        "",
        "| visual tokens | kept | batch | scorer | prefill | limit | reached | generate | limit | KV cache |",
        "|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    settings: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = (int(row["visual_tokens"]), int(row["budget"]), int(row["batch"]), row["scorer"])
        settings.setdefault(key, {})[row["metric"]] = row
    for (visual, kept, batch, scorer), found in sorted(settings.items()):
        prefill, whole, cache = found["prefill"], found.get("generate"), found.get("kv_cache")
        cells = [str(visual), str(kept), str(batch), scorer]
        cells += [f"{float(prefill['ratio']):.2f}x", f"{float(prefill['limit']):.2f}x"]
        cells += [f"{100 * float(prefill['share_of_limit']):.0f} %"]
        cells += [f"{float(whole['ratio']):.2f}x", f"{float(whole['limit']):.2f}x"] if whole else ["", ""]
        cells += [f"{float(cache['ratio']):.1f}x smaller"] if cache else [""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def models() -> str:
    """Supported model types by family."""
    families: dict[str, list[str]] = {}
    for model_type, family in lp_patch.supported().items():
        families.setdefault(family, []).append(f"`{model_type}`")
    lines = ["| family | model types |", "|---|---|"]
    lines += [f"| {family} | {', '.join(types)} |" for family, types in sorted(families.items())]
    return "\n".join(lines)


def modes() -> str:
    """What the tests said, by version of transformers."""
    import matrix

    return matrix.table()


def fill(readme: str) -> str:
    """The README with every section between its marks made anew."""
    for name, make in (("accuracy", accuracy), ("speed", speed), ("models", models), ("modes", modes)):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = readme.split(begin)
        after = rest.split(end)[1]
        readme = f"{before}{begin}\n{make()}\n{end}{after}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(fill(path.read_text()))
