"""Put what was measured and tested into README and docs, from files alone: `python examples/tables.py`."""

import csv
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import retention

import lp_patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

RESULTS = ROOT / "examples" / "results"
NAMES = {"llava": "LLaVA, 0.4 B", "qwen2_5_vl": "Qwen2.5-VL, 0.4 B"}
GPU_TOTAL, GPU_TOKEN = "generate, 2 new tokens", "a decoded token, dynamic cache"


def rows_of(name: str) -> list[dict[str, str]]:
    """A CSV file of the results; nothing if it was not measured."""
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def times(value: str | None) -> str:
    """A ratio as a cell."""
    return f"{float(value):.2f}x" if value else ""


def share(tower: str | None, prefill: str) -> str:
    """The vision tower's share of the unpatched prefill, as a cell."""
    return f"{100 * float(tower) / float(prefill):.0f} %" if tower else ""


def speed() -> str:
    """Speed-ups on a CPU and, where that was measured, on a GPU."""
    cpu, gpu = rows_of("benchmark_cpu.csv"), rows_of("benchmark_gpu.csv")
    new = cpu[0]["new_tokens"]
    hosts = [
        f"- CPU: {cpu[0]['device']}, {cpu[0]['threads']} thread, {cpu[0]['dtype']}, torch {cpu[0]['torch']}, "
        f"transformers {cpu[0]['transformers']}; `generate` makes {new} tokens."
    ]
    if gpu:
        hosts.append(
            f"- GPU: {gpu[0]['device']}, bfloat16, torch {gpu[0]['torch']}, transformers {gpu[0]['transformers']}; "
            "`generate` makes 2 tokens, with `compile=True`; a token is one of a dynamic cache."
        )
    else:
        hosts.append("- GPU: not measured yet; `python examples/benchmark.py --device cuda` does it.")
    lines = [
        *hosts,
        "",
        "| | model | visual tokens | kept | batch | vision tower | prefill | `compile=True` | stock in graphs too "
        "| generate | a token |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += ["| " + " | ".join(cells) + " |" for cells in [*cpu_cells(cpu), *gpu_cells(gpu)]]
    return "\n".join([*lines, "", *beside(cpu)])


def by_setting(rows: list[dict[str, str]], names: tuple[str, ...]) -> dict[tuple, list[dict[str, str]]]:
    """Rows of the same setting, in the file's order."""
    found: dict[tuple, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(tuple(row[x] for x in names), []).append(row)
    return found


def cpu_cells(rows: list[dict[str, str]]) -> list[list[str]]:
    """A row of the table for each setting of `benchmark.py`."""
    cells = []
    settings = by_setting(rows, ("model", "visual_tokens", "budget", "batch", "scorer"))
    for (model, *numbers, scorer), own in sorted(settings.items(), key=lambda x: (x[0][0], *map(int, x[0][1:4]))):
        visual, kept, batch = numbers
        found = {row["metric"]: row for row in own}
        prefill, whole = found["prefill"], found.get("generate", {}).get("ratio")
        tower = share(found["vision_tower"]["unpatched"], prefill["unpatched"])
        kept = "all" if kept == visual else f"{kept}, {scorer}"
        ratios = [f"{times(prefill['ratio'])} of {times(prefill['limit'])}", "", "", times(whole)]
        cells.append(["CPU", NAMES[model], visual, kept, batch, tower, *ratios, times(found["decode"]["ratio"])])
    return cells


def gpu_cells(rows: list[dict[str, str]]) -> list[list[str]]:
    """A row of the table for each setting of `benchmark_gpu.py` that has a prefill."""
    cells = []
    rows = [{"host": "", **row} for row in rows]  # two rented machines may differ more than two variants
    settings = by_setting(rows, ("host", "model", "visual_tokens", "kept", "batch", "scorer"))
    for (host, model, visual, kept, batch, scorer), own in settings.items():
        found = {(row["metric"], row["variant"]): row["value"] for row in own}
        if ("prefill", "stock") not in found:
            continue

        def over(metric: str, variant: str, base: str = "stock", found: dict = found) -> str:
            return times(found.get((f"{metric}, speed-up over {base}", variant)))

        cells.append(
            [
                *(f"GPU {host}".strip(), model, visual, f"{kept}, {scorer}", batch),
                share(found.get(("encoding images", "stock")), found["prefill", "stock"]),
                over("prefill", "patched"),
                over("prefill", "patched graphs"),
                over("prefill", "patched graphs", "stock graphs"),
                over(GPU_TOTAL, "patched graphs") or over(GPU_TOTAL, "patched"),
                over(GPU_TOKEN, "patched"),
            ]
        )
    return cells


def beside(rows: list[dict[str, str]]) -> list[str]:
    """What else the CPU's file says."""

    def ratio(row: dict[str, str], name: str = "ratio") -> str:
        return f"{float(row[name]):.2f}"

    def quartiles(row: dict[str, str]) -> str:
        return f"{ratio(row)}x (quartiles {ratio(row, 'ratio_q1')} to {ratio(row, 'ratio_q3')}, {row['pairs']} pairs)"

    spent = [100 * float(x["ratio"]) for x in rows if x["metric"] == "both_stages"]
    full = {x["metric"]: x for x in rows if x["budget"] == x["visual_tokens"]}
    equal = [x for x in rows if x["metric"] == "decode_equal_kv"]
    return [
        f"- On the CPU, choosing what to keep (stages 1 and 2) takes {min(spent):.1f} to {max(spent):.1f} % of the "
        "unpruned prefill.",
        f"- There, a patch with nothing to prune: prefill {quartiles(full['prefill'])}, a token "
        f"{quartiles(full['decode'])}.",
        "- There, a token against the stock model on a cache cut to as many tokens after a full prefill: "
        + "; ".join(f"{NAMES[x['model']].split(',')[0]} {quartiles(x)}" for x in equal)
        + ".",
    ]


def gpu(metric: str, variant: str, model: str, batch: int = 1) -> float:
    """A figure of the first host's for training-free pruning, at the fewest tokens that were measured."""
    rows = [
        row
        for row in rows_of("benchmark_gpu.csv")
        if (row["host"], row["model"], row["batch"], row["scorer"]) == ("A", model, str(batch), "diversity")
        and (row["metric"], row["variant"]) == (metric, variant)
    ]
    return float(min(rows, key=lambda row: int(row["kept"]))["value"])


CACHE, PEAK = "KV cache after a prefill", "peak memory of a prefill beside the weights"


def figures() -> str:
    """README's three figures, each where pruning pays and where it does not."""

    def kept(study: str, start: retention.Cell, **options: object) -> str:
        results = retention.STUDIES[study].results()
        cell = replace(start, tokens=32, **(options or results.both))
        share, low, high = (100 * x for x in results.retained(retention.SPLITS[0], cell))
        average = results.mean(retention.SPLITS[0], cell, "average")
        return f"**{share:.1f} %** ({low:.1f} to {high:.1f}) at {average:.1f} tokens"

    def over(model: str, batch: int = 1, variant: str = "patched") -> str:
        return f"**{gpu('prefill, speed-up over stock', variant, model, batch):.2f}x**"

    cpu = {
        (x["model"], x["budget"], x["batch"], x["scorer"]): float(x["ratio"])
        for x in rows_of("benchmark_cpu.csv")
        if x["metric"] == "prefill"
    }
    caches = [gpu(CACHE, variant, "LLaVA-1.5-7B") for variant in ("stock", "patched")]
    peaks = [gpu(PEAK, variant, "Qwen2.5-VL-7B") for variant in ("stock", "patched")]
    llava = "LLaVA-1.5-7B"
    free, trained = retention.base("diversity"), retention.base("covering", "learned")
    rows = [
        (
            "accuracy of all tokens' that `apply(model, tokens=32)` keeps, without weights",
            f"{kept('model', free)}: a small model that learned to miss tokens",
            f"{kept('smollm', free)}: a larger one that never missed any, as your model",
        ),
        (
            'the same with a trained pruner, `scorer="covering"`',
            f"{kept('model', trained)}: that small model",
            f"{kept('smollm', trained, **retention.ALONE)}: that larger one, without the second stage",
        ),
        (
            "prefill",
            f"{over(llava, 16)}: 16 prompts on a GPU; "
            f"**{cpu['llava', '32', '1', 'diversity']:.2f}x**: a small model on a CPU",
            f"{over(llava)}: one prompt on a GPU ({over(llava, 1, 'patched graphs')} with `compile=True`); "
            f"{over('Qwen2.5-VL-7B')}: Qwen2.5-VL-7B, which waits for its vision tower",
        ),
        (
            "memory",
            f"KV cache of a LLaVA-1.5-7B prompt **{caches[0]:.0f} MiB to {caches[1]:.0f}**",
            f"peak of Qwen2.5-VL-7B's prefill **{peaks[0]:.0f} MiB to {peaks[1]:.0f}**: that is the tower's",
        ),
    ]
    lines = ["| | where it pays | where it does not |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def memory() -> str:
    """What a prefill needs, on the GPU and on the CPU."""
    lines = [
        "| | model | visual tokens | kept | KV cache, MiB | working memory of a prefill, MiB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    rows = rows_of("benchmark_gpu.csv")
    settings = by_setting(rows, ("host", "model", "visual_tokens", "kept", "batch", "scorer"))
    for (host, model, visual, kept, *_), own in settings.items():
        found = {(row["metric"], row["variant"]): float(row["value"]) for row in own}
        if (CACHE, "stock") in found:
            pairs = [f"{found[x, 'stock']:.0f} to {found[x, 'patched']:.0f}" for x in (CACHE, PEAK)]
            lines.append(f"| GPU {host} | {model} | {visual} | {kept} | {' | '.join(pairs)} |")
    settings = by_setting(rows_of("benchmark_cpu.csv"), ("model", "visual_tokens", "budget", "batch", "scorer"))
    for (model, visual, kept, *_), own in settings.items():
        found = {row["metric"]: row for row in own}
        if "working_memory" in found:
            pairs = [
                f"{float(found[x]['unpatched']) / 2**20:.0f} to {float(found[x]['patched']) / 2**20:.0f}"
                for x in ("kv_cache", "working_memory")
            ]
            lines.append(f"| CPU | {NAMES[model]} | {visual} | {kept} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def kinds() -> dict[str, list[str]]:
    """Model types by what their decoder layers look at, as their tiny models have them."""
    from families import FAMILIES
    from tiny_models import TYPES, make

    from lp_patch.registry import MASKED, RECURRENT, find_parts

    found: dict[str, list[str]] = {"plain": [], "masked": [], "recurrent": []}
    for key in [*FAMILIES, *TYPES]:
        if ":" in key:
            continue  # a variant of a type
        parts = None if key in FAMILIES else find_parts(make(key)[0])
        names = () if parts is None else parts.kinds.names
        blocks = parts is not None and parts.blocks
        kind = "recurrent" if RECURRENT in names else "masked" if MASKED in names or blocks else "plain"
        found[kind].append(key)
    return found


LAYERS = {
    "plain": "every layer looks at all tokens before its own",
    "masked": "windows, blocks of image tokens that see one another, or an indexer",
    "recurrent": "some layers keep a state instead of keys",
}


def models() -> str:
    """The families that can be patched, by what their layers look at."""
    supported = lp_patch.supported()
    lines = ["| decoder layers | models |", "|---|---|"]
    for kind, types in kinds().items():
        names = sorted({supported[x] for x in types}, key=str.lower)
        lines.append(f"| {LAYERS[kind]} | {', '.join(names)} |")
    return "\n".join(lines)


def types() -> str:
    """Every type, by what the tests said."""
    import matrix

    return matrix.types(lp_patch.supported()).rstrip()


def families() -> str:
    """Everything that people do with a model, by what the tests said."""
    import matrix

    return matrix.families(lp_patch.supported()).rstrip()


def refused() -> str:
    """Types that are refused, with the reason."""
    from lp_patch.unfit import UNFIT

    rows = [f"| `{name}` | {why} |" for name, why in sorted(UNFIT.items())]
    return "\n".join(["| model type | why |", "|---|---|", *rows])


def modes() -> str:
    """What the tests said, by version of transformers."""
    import matrix

    return matrix.table()


def serving() -> str:
    """What a vLLM server gains, medians over the rounds."""
    rows = rows_of("benchmark_vllm.csv")
    shown = {
        "requests a second": "requests_per_s",
        "asked again": "again_per_s",
        "of their tokens found in the cache": "cached_share",
        "first token, ms": "first_token_ms",
        "tokens of a prompt": "prompt_tokens",
        "requests in the KV space": "requests_held",
    }
    lines = [
        f"{rows[0]['device']}, vLLM {rows[0]['vllm']}, {rows[0]['dtype']}; {rows[0]['questions']} questions, medians "
        f"of {len({x['round'] for x in rows})} rounds (`{rows[0]['command']}`).",
        "",
        f"| visual tokens | scorer | {' | '.join(shown)} |",
        "|---|---|" + "---:|" * len(shown),
    ]
    for name in dict.fromkeys(x["tokens"] for x in rows):
        own = [x for x in rows if x["tokens"] == name]
        middle = [statistics.median(float(x[column]) for x in own) for column in shown.values()]
        cells = [f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in middle]
        lines.append(f"| {name} | {'' if name == 'all' else own[-1]['scorer']} | {' | '.join(cells)} |")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "figures": figures,
    "speed": speed,
    "memory": memory,
    "models": models,
    "types": types,
    "families": families,
    "refused": refused,
    "modes": modes,
    "benchmark_vllm": serving,
}


def pages() -> list[Path]:
    """README, and the pages of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def fill(text: str) -> str:
    """A page with every section between its marks made anew."""
    for name, make in SECTIONS.items():
        text = retention.between(text, name, make)
    return retention.filled(text)


if __name__ == "__main__":
    for path in pages():
        path.write_text(fill(path.read_text()))
