"""What pruning gains on this machine: `bench(model, processor, picture, question)`."""

import csv
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .compat import CACHE
from .errors import UnsupportedInputError
from .install import Installation
from .loading import QUESTION, ask
from .patch import applied
from .registry import find_parts

NEAR = 0.15  # a smaller picture's tokens may differ by this share from those that pruning keeps on average


@dataclass(frozen=True)
class Timing:
    """One way to answer, medians over the runs; times in milliseconds, memory in MiB.

    Attributes:
        way: "stock", "patched" or "smaller picture".
        tokens: visual tokens, averaged over the decoder layers.
        prefill: until the first token; `decode`: of each further one; `total`: of the whole answer.
        cache: bytes of the KV cache after the answer; `peak`: of the device's memory in it, None on a CPU.
        tower: share of the prefill in which pictures are encoded, which no pruning after it saves; 0 with
            ``compile=True``, where it cannot be told.
        answer: what was said.
    """

    way: str
    tokens: float
    prefill: float
    decode: float
    total: float
    cache: float
    peak: float | None
    tower: float
    answer: str


@dataclass(frozen=True)
class Bench:
    """What `bench` measured; `str()` is a table."""

    model: str
    device: str
    runs: int
    rows: list[Timing]
    note: str

    def __str__(self) -> str:
        stock = self.rows[0]
        head = f"{'':<16} {'tokens':>7} {'prefill':>17} {'a token':>17} {'total':>17} {'KV MiB':>8} {'peak MiB':>9}"
        lines = [f"{self.model} on {self.device}; medians of {self.runs} runs in turn, milliseconds", head]
        for x in self.rows:
            times = [
                f"{mine:9.1f} {before / mine:6.2f}x"
                for mine, before in ((x.prefill, stock.prefill), (x.decode, stock.decode), (x.total, stock.total))
            ]
            peak = "-" if x.peak is None else f"{x.peak:.0f}"
            lines.append(f"{x.way:<16} {x.tokens:7.1f} {' '.join(times)} {x.cache:8.2f} {peak:>9}")
        lines.append(
            f"encoding the picture takes {stock.tower:.0%} of the stock prefill: pruning after it gains at most "
            f"{1 / max(stock.tower, 1e-3):.1f}x"
        )
        return "\n".join([*lines, *([self.note] if self.note else [])])

    def save(self, path: str | Path) -> None:
        """Write the rows as CSV, with the command that made them."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        same = {"model": self.model, "device": self.device, "runs": self.runs, "command": shlex.join(sys.argv)}
        with path.open("w", newline="", encoding="utf-8") as file:
            names = [*(x.name for x in fields(Timing)), *same]
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows([{**asdict(x), **same} for x in self.rows])


@torch.inference_mode()
def bench(
    model: Any,
    processor: Any,
    picture: Any,
    question: str = QUESTION,
    *,
    runs: int = 5,
    new_tokens: int = 16,
    options: dict[str, Any] | None = None,
) -> Bench:
    """Time one question about one picture: stock, patched, and with a smaller picture of as many visual tokens.

    The ways take turns, and a first turn does not count. All make the same number of tokens, greedily.

    Args:
        model: unpatched; it is again afterwards.
        picture: a PIL image.
        new_tokens: of each answer.
        options: of `apply`.
    """
    if new_tokens < 2:
        raise UnsupportedInputError(f"new_tokens must be at least 2, to time a token after the first, got {new_tokens}")
    parts, options = find_parts(model), options or {}
    place = partial(_place, model)
    inputs = place(ask(processor, picture, question))
    with applied(model, **options) as patch:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        trace = patch.trace
        assert trace is not None
    present = trace.visual_tokens[0]
    kept = statistics.fmean(trace.tokens_per_layer[0])
    if present == 0:
        raise UnsupportedInputError("the prompt holds no visual tokens: does the chat template write any?")
    ways: dict[str, tuple[float, Any, Callable[[], Any] | None]] = {
        "stock": (present, inputs, None),
        "patched": (kept, inputs, lambda: applied(model, **options)),
    }
    count = partial(_count, parts)
    smaller = _smaller(processor, picture, question, kept, present, count)
    note = ""
    if smaller is None:
        note = "a smaller picture has as many tokens, to this processor: pruning is the only way to fewer"
    else:
        ways["smaller picture"] = (count(smaller), place(smaller), None)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for run in tqdm(range(runs + 1), desc="bench", unit="turn", disable=None):
        for name, (_, given, wrap) in ways.items():
            with nullcontext() if wrap is None else wrap():
                captured = wrap is not None and bool(options.get("compile"))
                timed = _time(parts, given, new_tokens, captured)
            if run:
                found[name].append(timed)
    rows = []
    for name, (tokens, given, _) in ways.items():
        middle = {key: statistics.median(x[key] for x in found[name]) for key in found[name][0] if key != "ids"}
        new = found[name][-1]["ids"][0, given["input_ids"].shape[1] :]
        peak = middle["peak"] if model.device.type == "cuda" else None
        answer = processor.decode(new, skip_special_tokens=True).strip()
        rows.append(Timing(name, tokens, **{**middle, "peak": peak}, answer=answer))
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    threads = "" if device != "CPU" else f", {torch.get_num_threads()} threads"
    name = getattr(model, "name_or_path", "") or type(model).__name__
    return Bench(name, f"{device}{threads}, {model.dtype}".replace("torch.", ""), runs, rows, note)


def _place(model: Any, inputs: Any) -> Any:
    return inputs.to(model.device, model.dtype)


def _count(parts: Any, inputs: Any) -> int:
    """Placeholders in a prompt."""
    return sum(int((inputs["input_ids"] == m.placeholder).sum()) for m in parts.modalities)


def _smaller(
    processor: Any, picture: Any, question: str, wanted: float, present: int, count: Callable[[Any], int]
) -> Any:
    """The prompt with the picture scaled down to about so many tokens; None where the processor makes no fewer."""
    low, high, best = 0.0, 1.0, None
    for _ in range(8):
        factor = (low + high) / 2
        size = [max(1, round(x * factor)) for x in picture.size]
        try:
            inputs = ask(processor, picture.resize(size), question)
        except ValueError:  # too small for this processor
            low = factor
            continue
        tokens = count(inputs)
        if best is None or abs(tokens - wanted) < abs(best[0] - wanted):
            best = (tokens, inputs)
        low, high = (factor, high) if tokens < wanted else (low, factor)
    return None if best is None or abs(best[0] - wanted) > NEAR * wanted or best[0] >= present else best[1]


class _Clock:
    """A streamer for `generate`: when it had the prompt, and then each token."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(_now(self.model))

    def end(self) -> None:
        """Nothing is to be flushed."""


def _time(parts: Any, inputs: Any, new_tokens: int, captured: bool) -> dict[str, Any]:
    """An answer, in milliseconds and MiB; the tower of captured regions runs inside them, out of reach of a clock."""
    model, spent, on, clock = parts.model, [0.0], Installation(), _Clock(parts.model)

    def around(wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        start = _now(model)
        try:
            return wrapped(*args, **kwargs)
        finally:
            spent[0] += _now(model) - start

    if captured:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)  # a shape is captured at its first call
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    for method in set() if captured else {m.encode for m in parts.modalities}:
        on.wrap(parts.base, method, around)
    try:
        start = _now(model)
        output = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            streamer=clock,
        )
        total = _now(model) - start
    finally:
        on.remove()
    _, first, *_, last = clock.times
    held = [x for layer in output[CACHE].layers for x in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return {
        "prefill": 1e3 * (first - start),
        "decode": 1e3 * (last - first) / (new_tokens - 1),
        "total": 1e3 * total,
        "cache": sum(x.numel() * x.element_size() for x in held if isinstance(x, torch.Tensor)) / 2**20,
        "peak": torch.cuda.max_memory_allocated(model.device) / 2**20 if model.device.type == "cuda" else 0.0,
        "tower": spent[0] / (first - start),
        "ids": output.sequences,
    }


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
