"""Put the measured tables into the README, from the CSV files alone: `python examples/tables.py`."""

import csv
import sys
from pathlib import Path

import retention

import lp_patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

RESULTS = ROOT / "examples" / "results"
SHAPES = {"small": "of a 0.4 B LLaVA", "7b": "of LLaVA-1.5-7B"}


def speed(device: str) -> str:
    """Speed-ups, limits and what share of them is reached."""
    with (RESULTS / f"benchmark_{device}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    one = rows[0]
    lines = [
        f"{one['device']}, {one['dtype']}, random weights in the shapes {SHAPES[one['size']]}"
        + (f", {one['threads']} thread(s)" if device == "cpu" else "")
        + f", torch {one['torch']}, transformers {one['transformers']}.",
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
    """What the tests of each supported family said."""
    import matrix

    return matrix.families(lp_patch.supported())


def modes() -> str:
    """What the tests said, by version of transformers."""
    import matrix

    return matrix.table()


def fill(readme: str) -> str:
    """The README with every section between its marks made anew."""
    sections = {"speed": lambda: speed("cpu"), "speed gpu": lambda: speed("cuda"), "models": models, "modes": modes}
    for name, make in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = readme.split(begin)
        after = rest.split(end)[1]
        readme = f"{before}{begin}\n{make()}\n{end}{after}"
    return retention.filled(readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(fill(path.read_text()))
