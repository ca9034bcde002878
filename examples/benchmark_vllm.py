"""What pruning is worth in a vLLM server: ``python examples/benchmark_vllm.py`` in vLLM's environment.

The testbed's model, all its visual tokens (ratio 1 of the same plugin) against 64 and 16, one engine after the other in
each round, several rounds. One CSV row per engine and round, written as soon as it is measured; then the plot.

What the columns mean
    requests_per_s      all questions at once, each picture seen for the first time
    first_token_ms      one request alone about a picture never seen, from its submission to its first token, median
    prompt_tokens       mean of the prompts: KV tokens that a request takes before its answer
    again_per_s         the same questions again: pictures and prompts are found in the caches
    cached_share        of the prompts' tokens, those found there
    kv_tokens           what the KV space holds
    requests_held       how many requests of this length (with an answer of 16) that is
"""

import argparse
import csv
import datetime
import gc
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import lp_patch
import lp_patch.vllm
from lp_patch.colours import BLUE, GREEN

TESTBED = Path(__file__).resolve().parent / "testbed"
RESULTS = Path(__file__).resolve().parent / "results"
SETTINGS: dict[str, dict[str, Any]] = {
    "all": {"ratio": 1.0, "scorer": "diversity"},
    "64": {"tokens": 64, "scorer": "learned"},
    "16": {"tokens": 16, "scorer": "covering"},
}
ALONE = 12  # requests for first_token_ms
ANSWER = 16


def prompts(count: int) -> list[dict]:
    """The testbed's questions, as vLLM takes them."""
    asked = json.loads((TESTBED / "evaluation" / "questions.json").read_text())["questions"][:count]
    folder = TESTBED / "evaluation" / "pictures"
    pictures = {name: Image.open(folder / name).convert("RGB") for name in {x["picture"]: None for x in asked}}
    return [
        {
            "prompt": f"USER: <image>\n{x['question']} ASSISTANT:",
            "multi_modal_data": {"image": pictures[x["picture"]]},
        }
        for x in asked
    ]


def apart(asked: list[dict]) -> list[dict]:
    """A question about each picture."""
    return list({id(x["multi_modal_data"]["image"]): x for x in asked}.values())


def measure(model: Path, options: dict, asked: list[dict]) -> dict[str, float]:
    """One engine's figures."""
    overrides = lp_patch.vllm.overrides(model, **options)
    engine = {"dtype": "float32", "enforce_eager": True, "distributed_executor_backend": "uni", "max_model_len": 700}
    engine["block_size"] = 32  # a prompt of 28 tokens still fills none
    llm = LLM(str(model), hf_overrides=overrides, **engine)
    sampling = SamplingParams(max_tokens=3, temperature=0)
    try:
        first = []
        for prompt in apart(asked)[: ALONE + 1]:
            began = time.perf_counter()
            llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
            first.append(1000 * (time.perf_counter() - began))
        llm.reset_prefix_cache()
        llm.reset_mm_cache()
        began = time.perf_counter()
        outputs = llm.generate(asked, sampling, use_tqdm=False)
        between = time.perf_counter()
        again = llm.generate(asked, sampling, use_tqdm=False)
        ended = time.perf_counter()
        tokens = [len(x.prompt_token_ids) for x in outputs]
        cache = llm.llm_engine.vllm_config.cache_config
        held = cache.num_gpu_blocks * cache.block_size
        return {
            "requests_per_s": len(asked) / (between - began),
            "first_token_ms": statistics.median(first[1:]),
            "prompt_tokens": statistics.mean(tokens),
            "again_per_s": len(asked) / (ended - between),
            "cached_share": sum(x.num_cached_tokens or 0 for x in again) / sum(tokens),
            "kv_tokens": held,
            "requests_held": held / (statistics.mean(tokens) + ANSWER),
        }
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def plot(rows: list[dict], path: Path) -> None:
    """Throughput, time to the first token and requests held, by tokens of a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {
        "requests_per_s": "requests per second",
        "first_token_ms": "time to first token, ms",
        "requests_held": "requests in 1 GiB of KV",
    }
    names = [name for name in SETTINGS if any(row["tokens"] == name for row in rows)]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(10, 3), layout="constrained")
    for axis, (column, label) in zip(axes, shown.items(), strict=True):
        values = [[float(row[column]) for row in rows if row["tokens"] == name] for name in names]
        middle = [statistics.median(x) for x in values]
        both = list(zip(middle, values, strict=True))
        spread = [[m - min(x) for m, x in both], [max(x) - m for m, x in both]]
        bars = axis.bar(names, middle, yerr=spread, color=["#999999", BLUE, GREEN][: len(names)], capsize=4)
        axis.bar_label(bars, fmt="{:,.0f}", padding=4)
        axis.set(title=label, xlabel="visual tokens of a picture")
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "benchmark_vllm.csv")
    args = parser.parse_args()
    asked, rows = prompts(args.questions), []
    for round_ in range(args.rounds):
        for name, options in SETTINGS.items():
            rows.append(
                {
                    "tokens": name,
                    "scorer": options["scorer"],
                    "round": round_,
                    "questions": args.questions,
                    **{column: f"{value:.4g}" for column, value in measure(TESTBED / "model", options, asked).items()},
                    "dtype": "float32",
                    "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
                    "vllm": lp_patch.vllm.internals.installed(),
                    "torch": torch.__version__,
                    "transformers": version("transformers"),
                    "lp_patch": lp_patch.__version__,
                    "date": datetime.date.today().isoformat(),
                    "command": f"examples/benchmark_vllm.py --questions {args.questions} --rounds {args.rounds}",
                }
            )
            print(", ".join(f"{key} {value}" for key, value in list(rows[-1].items())[:11]), flush=True)
            with args.output.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
