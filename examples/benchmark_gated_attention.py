"""Time and memory of `lp_patch.training.gated_attention` against its formula in eager form, forward and backward.

``python examples/benchmark_gated_attention.py`` writes one CSV row per length. Eager means the full maps: a softmax
with the gate multiplied in, differentiated by autograd.

What the columns mean
    eager_s, gated_s   median seconds of one forward and backward
    speedup            median of eager/gated over adjacent pairs (eager, gated, eager, ...), with its quartiles
                       speedup_q1 and speedup_q3: they tell how noisy the machine was
    *_largest_bytes    the largest tensor that any operation put out
    *_peak_bytes       what one forward and backward adds to memory at its peak; on a CPU to the resident set of a
                       process that does nothing else
    *_ratio            eager over gated
"""

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lp_patch.training import gated_attention

RESULTS = Path(__file__).resolve().parent / "results"


def eager_attention(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """The same function with full maps: (B, H, L, D)."""
    heads, length, dim = query.shape[1:]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
    scores = (query @ key.mT * dim**-0.5).masked_fill(ones.triu(1), -torch.inf)
    weight = torch.where(ones.tril().triu(), 1.0, gate[:, None, None, :])
    parts = (scores - scores.detach().amax(dim=-1, keepdim=True)).exp() * weight
    return parts / parts.sum(dim=-1, keepdim=True) @ value


FORMS: dict[str, Callable[..., Tensor]] = {"eager": eager_attention, "gated": gated_attention}


def make_inputs(options: argparse.Namespace, length: int) -> tuple[list[Tensor], Tensor]:
    """Query, key, value and a gate that closes half of the tokens; and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    query, key, value, upstream = (
        torch.randn(options.batch, n, length, options.dim, generator=generator).to(options.device) for n in heads
    )
    gate = (torch.rand(options.batch, length, generator=generator) > 0.5).float().to(options.device)
    return [x.requires_grad_() for x in (query, key, value, gate)], upstream


def step(form: str, inputs: list[Tensor], upstream: Tensor) -> float:
    """Seconds of one forward and backward."""
    start = time.perf_counter()
    torch.autograd.grad(FORMS[form](*inputs), inputs, upstream)
    if upstream.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation put out."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def peak(options: argparse.Namespace, form: str, length: int) -> int:
    """Bytes that one step adds to memory at its peak. On a CPU: only meaningful in a fresh process."""
    step(form, *make_inputs(options, 16))  # libraries load what they load
    inputs, upstream = make_inputs(options, length)
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(form, inputs, upstream)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_bytes("VmRSS")
    step(form, inputs, upstream)
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(f"{name}:"))


def compare(options: argparse.Namespace, length: int) -> dict[str, object]:
    """One row of the table."""
    inputs, upstream = make_inputs(options, length)
    for form in FORMS:
        step(form, inputs, upstream)
    count = options.pairs * max(options.lengths) // length  # short steps are the noisy ones
    pairs = [[step(form, inputs, upstream) for form in FORMS] for _ in range(count)]
    first, speedup, third = statistics.quantiles((a / b for a, b in pairs), n=4, method="inclusive")
    found: dict[str, object] = {
        **{f"{form}_s": f"{statistics.median(x):.6g}" for form, x in zip(FORMS, zip(*pairs, strict=True), strict=True)},
        **{"speedup": f"{speedup:.3f}", "speedup_q1": f"{first:.3f}", "speedup_q3": f"{third:.3f}"},
        "pairs": len(pairs),
    }
    largest, peaks = {}, {}
    for form in FORMS:
        with Largest() as seen:
            step(form, inputs, upstream)
        largest[form] = seen.bytes
        if options.device == "cpu":
            ask = [sys.executable, __file__, *sys.argv[1:], "--peak-of", form, "--lengths", str(length)]
            peaks[form] = int(subprocess.run(ask, stdout=subprocess.PIPE, text=True, check=True).stdout)
        else:
            peaks[form] = peak(options, form, length)
    for name, measured in (("largest", largest), ("peak", peaks)):
        found |= {f"{form}_{name}_bytes": measured[form] for form in FORMS}
        found[f"{name}_ratio"] = f"{measured['eager'] / measured['gated']:.2f}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=9, help="at the greatest length, more at shorter ones")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak-of", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(peak(options, options.peak_of, options.lengths[0]))
        return
    output = options.output or RESULTS / f"gated_attention_{options.device.split(':')[0]}.csv"
    cpu = options.device == "cpu"
    about = {
        "date": datetime.date.today().isoformat(),
        "device": f"cpu {platform.machine()}" if cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: getattr(options, name) for name in ("threads", "batch", "heads", "kv_heads", "dim")},
    }
    rows = []
    for length in options.lengths:
        rows.append({**about, "length": length, **compare(options, length)})
        print("  ".join(f"{name} {value}" for name, value in list(rows[-1].items())[len(about) :]), flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
