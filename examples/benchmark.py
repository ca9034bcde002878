"""Speed and memory of a patched model against the unpatched one: random weights in real proportions, no downloads.

``python examples/benchmark.py`` measures unpatched and patched in turn (A B A B ...) in one process and writes one CSV
row per setting and metric. The plot is made from the CSV alone (``--plot FILE.csv`` redraws it). ``--device cuda`` runs
`benchmark_gpu.py` instead, which takes its own options (``--seconds``, ``--runs``, ``--only``) and writes its own file.

A LLaVA, whose vision tower has 4 % of the arithmetic of a prefill, and a Qwen2.5-VL, whose tower takes a third of the
time of one: what pruning cannot save.

What the columns mean
    unpatched, patched   medians: seconds, seconds per token (decode), or bytes. Seconds are CPU time of the one thread
                         that runs: what a clock on the wall shows where nothing else does
    ratio                median of unpatched/patched over adjacent pairs; for the stages that only the patch has
                         (selection, scoring) their time over the unpatched prefill of the same pair
                         (decode_equal_kv: the unpatched model decodes on a cache of which as many tokens are left as
                         the patched one holds, as after a KV-cache compressor)
    limit                arithmetic of the unpatched phase over that of the patched one, counted on the shapes that the
                         modules really saw: linear layers, convolutions and both attention products (causal: half)
    share_of_limit       ratio / limit; above 1 where long sequences ran less efficiently than short ones, far below 1
                         where arithmetic is not what takes the time: decoding reads all weights for every token

The prefill is one forward over the whole prompt, images included, with the logits of the last position, as `generate`
asks for. Selection is all of stage 1 (scores, choice), scoring all of stage 2. Peak memory is that of one prefill: on a
CPU the peak resident set of a fresh process, weights included; "working" is what the prefill adds to them.
"""

import argparse
import csv
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import torch
import transformers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import lp_patch
from lp_patch import choose, colours, early
from lp_patch.compat import CACHE
from lp_patch.engine import Engine
from lp_patch.forward import Forward

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
PER_IMAGE = {"llava": 576, "qwen2_5_vl": 640}  # visual tokens; LLaVA: 336-pixel images in patches of 14
NAMES = {"llava": "LLaVA", "qwen2_5_vl": "Qwen2.5-VL"}
GRID = (40, 64)  # Qwen's patches of an image, four to a token
TEXT = (36, 24)  # text tokens before and after the images: LLaVA-1.5's system prompt and a short question
VOCABULARY, IMAGE_TOKEN = 32064, 32000

# (width, MLP width, layers, heads) of the vision tower and of the language model, for one core; the towers have the
# share of the arithmetic that they have in the models of 7 B
SIZES = {
    "tiny": {
        "llava": ((64, 128, 3, 2), (64, 128, 4, 2)),
        "qwen2_5_vl": ((64, 128, 3, 2), (64, 128, 4, 2)),
    },
    "small": {
        "llava": ((768, 3072, 2, 12), (1024, 2752, 24, 8)),
        "qwen2_5_vl": ((512, 1376, 8, 8), (1024, 2752, 24, 8)),
    },
}


@dataclass(frozen=True)
class Setting:
    """One comparison: `images` in one prompt, a budget of `tokens` for each of them, `pairs` of measurements."""

    tokens: int
    images: int = 1
    batch: int = 1
    scorer: str = "diversity"
    pairs: int = 4
    model: str = "llava"

    @property
    def visual(self) -> int:
        """Visual tokens of a prompt."""
        return self.images * PER_IMAGE[self.model]

    @property
    def full_budget(self) -> bool:
        """Whether the patch has nothing to prune."""
        return self.tokens >= PER_IMAGE[self.model]


SETTINGS = [
    Setting(32),
    Setting(71, model="qwen2_5_vl"),
    Setting(576, pairs=7),
    *(Setting(tokens, pairs=2) for tokens in (64, 192)),
    Setting(32, scorer="learned", pairs=2),
    Setting(32, batch=4, pairs=2),
    Setting(32, images=5, pairs=2),
]
QUICK_SETTINGS = [
    Setting(64, pairs=2),
    Setting(32, scorer="learned", pairs=2),
    Setting(32, images=5, pairs=2),
    Setting(64, batch=4, pairs=2),
    Setting(576, pairs=2),
    Setting(71, pairs=2, model="qwen2_5_vl"),
]


# ------------------------------------------------------------------ model and inputs


def build(kind: str, size: str, dtype: torch.dtype) -> Any:
    """A model of one kind and size with random weights."""
    vision, text = SIZES[size][kind]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    language = {**dict(zip(names, text, strict=True)), "vocab_size": VOCABULARY, "max_position_embeddings": 4096}
    if kind == "llava":
        tower = CLIPVisionConfig(
            **dict(zip(names, vision, strict=True)), image_size=336, patch_size=14, projection_dim=vision[0]
        )
        llava = LlavaConfig(vision_config=tower, text_config=LlamaConfig(**language), image_token_id=IMAGE_TOKEN)
    else:
        width, mlp, depth, heads = vision
        whole = [depth // 2 - 1, depth - 1]  # the others attend within windows
        half = text[0] // text[3] // 2
        qwen = Qwen2_5_VLConfig(
            vision_config={
                **{"hidden_size": width, "intermediate_size": mlp, "depth": depth, "num_heads": heads},
                **{"out_hidden_size": text[0], "fullatt_block_indexes": whole},
            },
            text_config={
                **language,
                **{"num_key_value_heads": text[3] // 2, "bos_token_id": 1, "eos_token_id": 2},
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [half // 4, 3 * half // 8, 3 * half // 8],
                },
            },
            image_token_id=IMAGE_TOKEN,
            vision_start_token_id=IMAGE_TOKEN + 1,
            vision_end_token_id=IMAGE_TOKEN + 2,
        )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = (
            LlavaForConditionalGeneration(llava) if kind == "llava" else Qwen2_5_VLForConditionalGeneration(qwen)
        ).eval()
    finally:
        torch.set_default_dtype(before)
    # random weights must not end a generation early
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def make_inputs(model: Any, setting: Setting) -> dict[str, torch.Tensor]:
    """A batch of prompts, text - images - text, with noise for pixels."""
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randint(3, 30000, (setting.batch, n), generator=generator) for n in TEXT)
    ids = torch.cat([before, torch.full((setting.batch, setting.visual), IMAGE_TOKEN), after], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    count = setting.batch * setting.images
    if setting.model == "llava":
        return {**inputs, "pixel_values": torch.randn(count, 3, 336, 336, generator=generator).to(model.dtype)}
    ids[:, TEXT[0] - 1], ids[:, -TEXT[1]] = IMAGE_TOKEN + 1, IMAGE_TOKEN + 2
    pixels = torch.randn(count * GRID[0] * GRID[1], 3 * 2 * 14 * 14, generator=generator)
    return {
        **inputs,
        "pixel_values": pixels.to(model.dtype),
        "image_grid_thw": torch.tensor([[1, *GRID]] * count),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
    }


def pruning(model: Any, setting: Setting) -> Any:
    """The patch of a setting, as a context."""
    if setting.scorer != "learned":
        return lp_patch.applied(model, tokens=setting.tokens, scorer=setting.scorer)
    torch.manual_seed(0)
    pruner = lp_patch.LearnablePruner(model.config.vision_config.hidden_size).to(model.dtype)
    return lp_patch.applied(model, tokens=setting.tokens, pruner=pruner)


def cache_bytes(cache: Any) -> int:
    """Bytes that the tensors of a KV cache really occupy."""
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))


# ------------------------------------------------------------------ clocks


class Clock:
    """Nested named spans; a span's time is without that of the spans inside it."""

    def __init__(self) -> None:
        self.open: list[int] = []
        self.spans: list[list] = []  # name, start, end, parent

    def start(self, name: str) -> None:
        """Open a span."""
        self.spans.append([name, time.process_time(), None, self.open[-1] if self.open else None])
        self.open.append(len(self.spans) - 1)

    def stop(self) -> None:
        """Close the innermost open span."""
        self.spans[self.open.pop()][2] = time.process_time()

    def read(self) -> dict[str, float]:
        """Seconds of all spans by name, and begin anew."""
        times: dict[str, float] = defaultdict(float)
        for name, start, end, parent in self.spans:
            seconds = end - start
            times[name] += seconds
            if parent is not None:
                times[self.spans[parent][0]] -= seconds
        self.spans = []
        return times

    def time_module(self, module: nn.Module, name: str) -> None:
        """Give a module's forward a span of its own, for good."""
        module.register_forward_pre_hook(lambda *_: self.start(name))
        module.register_forward_hook(lambda *_: self.stop())

    @contextmanager
    def time_functions(self, owner: Any, names: dict[str, str]) -> Iterator[None]:
        """Give functions of a class or a module, {function: span}, spans of their own."""

        def timed(method: Callable, name: str) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.start(name)
                try:
                    return method(*args, **kwargs)
                finally:
                    self.stop()

            return call

        with ExitStack() as stack:
            for method, name in names.items():
                stack.enter_context(mock.patch.object(owner, method, timed(getattr(owner, method), name)))
            yield


# ------------------------------------------------------------------ arithmetic


def parts(model: Any) -> dict[str, list[nn.Module]]:
    """The modules that compute, by the name under which a profile lists them."""
    base, layers = model.model, list(model.model.language_model.layers)
    k = round(0.375 * len(layers))  # the paper's 12 of 32
    llava = hasattr(base, "vision_tower")
    return {
        "vision_tower": [base.vision_tower if llava else base.visual],
        "projector": [base.multi_modal_projector] if llava else [],  # Qwen's merger is part of its tower
        f"decoder layers 1-{k}": layers[:k],
        f"decoder layers {k + 1}-{len(layers)}": layers[k:],
        "lm_head": [model.lm_head],
    }


@contextmanager
def counted_flops(model: Any) -> Iterator[dict[str, float]]:
    """Floating-point operations of everything that runs inside, by part; 2 per multiply-add.

    Read off the tensors that the modules see, so that it knows nothing of budgets: each linear layer and convolution
    for the positions that it computed, each attention for the query-key pairs that exist under its mask.
    """
    flops: dict[str, float] = defaultdict(float)

    def linear(part: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        channels = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
        flops[part] += 2.0 * module.weight.numel() * (output.numel() // channels)

    def attention(part: str, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        batch, queries = hidden.shape[:2]
        cache = kwargs.get(CACHE)
        keys = queries if cache is None else cache.layers[module.layer_idx].keys.shape[2]
        pairs = queries * keys - (queries * (queries - 1) // 2 if module.is_causal else 0)
        flops[part] += 4.0 * batch * module.q_proj.out_features * pairs

    def packed(part: str, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        pairs = float(kwargs["cu_seqlens"].diff().square().sum())
        flops[part] += 4.0 * module.dim * pairs

    handles = []
    for part, roots in parts(model).items():
        for root in roots:
            for module in root.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                    handles.append(module.register_forward_hook(partial(linear, part)))
                elif hasattr(module, "qkv"):
                    handles.append(module.register_forward_hook(partial(packed, part), with_kwargs=True))
                elif hasattr(module, "q_proj"):
                    handles.append(module.register_forward_hook(partial(attention, part), with_kwargs=True))
    try:
        yield flops
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------ measuring


@torch.inference_mode()
def prefill(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """One forward over the prompt; the output carries the cache."""
    return model(**inputs, use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def decode(model: Any, mask: torch.Tensor, output: Any, steps: int) -> tuple[torch.Tensor, Any]:
    """Greedy steps after a forward, all of whose tokens so far have this mask (B, S); the new mask and output."""
    for _ in range(steps):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        output = model(
            input_ids=output.logits[:, -1:].argmax(dim=-1),
            attention_mask=mask,
            position_ids=torch.full((len(mask), 1), mask.shape[1] - 1),
            **{CACHE: output[CACHE]},
            use_cache=True,
            logits_to_keep=1,
        )
    return mask, output


def measure(model: Any, inputs: dict[str, torch.Tensor], clock: Clock, new: int, generate: bool) -> dict[str, float]:
    """One measurement of one variant: `new` tokens, the first of which comes from the prefill."""
    clock.read()
    start = time.process_time()
    output = prefill(model, inputs)
    filled = time.process_time()
    times = dict(clock.read())
    times["kv_cache"] = cache_bytes(output[CACHE])
    begin = time.process_time()
    decode(model, inputs["attention_mask"], output, new - 1)
    times |= {"prefill": filled - start, "decode": (time.process_time() - begin) / (new - 1)}
    del output
    if generate:
        start = time.process_time()
        model.generate(**inputs, max_new_tokens=new, do_sample=False)
        times["generate"] = time.process_time() - start
    return times


def count(model: Any, inputs: dict[str, torch.Tensor], new: int) -> dict[str, float]:
    """FLOPs by metric, and bytes of the cache by shape; also the warm-up of what is measured."""
    with counted_flops(model) as flops:
        output = prefill(model, inputs)
        first = dict(flops)
        decode(model, inputs["attention_mask"], output, new - 1)
    total = sum(flops.values())
    return {
        "vision_tower": first["vision_tower"],
        "prefill": sum(first.values()),
        "decode": (total - sum(first.values())) / (new - 1),
        "generate": total,
    }


def equal_kv(model: Any, setting: Setting, steps: int) -> list[dict]:
    """Decoding on what the patch left in the cache, against the stock model on a cache cut to as many tokens.

    The compressor's cut is taken for free. It leaves each layer the mean number of tokens, any of them: time does not
    depend on which. Both go on, `steps` tokens each in turn.
    """
    inputs = make_inputs(model, setting)
    mask, whole = inputs["attention_mask"], prefill(model, inputs)
    with pruning(model, setting):
        pruned = prefill(model, inputs)
    held = [layer.keys.shape[2] for layer in pruned[CACHE].layers]
    tokens = round(sum(held) / len(held))
    for layer in whole[CACHE].layers:
        layer.keys, layer.values = (x[:, :, -tokens:].contiguous() for x in (layer.keys, layer.values))
    variants: list[Callable[[], Any]] = [nullcontext, lambda: pruning(model, setting)]
    states, times = [(mask[:, -tokens:], whole), (mask, pruned)], [[], []]
    for _ in range(4 * setting.pairs + 1):
        for i, variant in enumerate(variants):
            with variant():
                begin = time.process_time()
                states[i] = decode(model, *states[i], steps)
                times[i].append((time.process_time() - begin) / steps)
    before, after = (x[1:] for x in times)  # the first round warms up
    return [row("decode_equal_kv", before, after, [a / b for a, b in zip(before, after, strict=True)], None)]


def compare(model: Any, setting: Setting, clock: Clock, new: int) -> list[dict]:
    """All timed metrics of one setting, as rows."""
    inputs = make_inputs(model, setting)
    variants: list[Callable[[], Any]] = [nullcontext, lambda: pruning(model, setting)]
    flops = []
    for variant in variants:
        with variant():
            flops.append(count(model, inputs, new))
    pairs: list[list[dict[str, float]]] = []
    for _ in range(setting.pairs):
        pair = []
        for variant in variants:
            with variant():
                pair.append(measure(model, inputs, clock, new, not setting.full_budget))
        pairs.append(pair)

    rows = []
    for metric in ("vision_tower", "prefill", "decode", "generate", "kv_cache"):
        if metric in pairs[0][0]:
            before, after = ([pair[i][metric] for pair in pairs] for i in (0, 1))
            limit = flops[0][metric] / flops[1][metric] if metric in flops[0] else None
            rows.append(row(metric, before, after, [a / b for a, b in zip(before, after, strict=True)], limit))
    if not setting.full_budget:
        whole = [pair[0]["prefill"] for pair in pairs]
        stages = {"selection": ("selection",), "scoring": ("scoring",), "both_stages": ("selection", "scoring")}
        for metric, names in stages.items():
            spent = [sum(pair[1][name] for name in names) for pair in pairs]
            rows.append(row(metric, [], spent, [a / b for a, b in zip(spent, whole, strict=True)], None))
    return rows


def row(metric: str, before: list[float], after: list[float], ratios: list[float], limit: float | None) -> dict:
    """Quartiles of one metric."""
    ratio = statistics.median(ratios)
    first, _, third = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratio] * 3
    return {
        "metric": metric,
        "unpatched": f"{statistics.median(before):.6g}" if before else "",
        "patched": f"{statistics.median(after):.6g}",
        "ratio": f"{ratio:.4f}",
        "ratio_q1": f"{first:.4f}",
        "ratio_q3": f"{third:.4f}",
        "limit": "" if limit is None else f"{limit:.4f}",
        "share_of_limit": "" if limit is None else f"{ratio / limit:.4f}",
        "pairs": len(ratios),
    }


# ------------------------------------------------------------------ memory


def peak_memory(model: Any, setting: Setting, patched: bool) -> dict[str, int]:
    """Bytes at the peak of one prefill, and what of them it added, in a process that does nothing else."""
    inputs = make_inputs(model, setting)
    with pruning(model, setting) if patched else nullcontext():
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status_bytes("VmRSS")
        prefill(model, inputs)
        peak = _status_bytes("VmHWM")
    return {"peak_memory": peak, "working_memory": peak - before}


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith(f"{name}:"))


def compare_memory(measure_one: Callable[[Setting, bool], dict[str, int]], setting: Setting) -> list[dict]:
    """Memory of one setting, as rows."""
    before, after = measure_one(setting, False), measure_one(setting, True)
    return [row(name, [before[name]], [after[name]], [before[name] / after[name]], None) for name in before]


def in_fresh_process(size: str, dtype: str, known: dict, setting: Setting, patched: bool) -> dict[str, int]:
    """`peak_memory` in a process of its own. Unpatched, it depends on the prompt alone: asked once."""
    key = (setting.model, setting.images, setting.batch) if not patched else setting
    if key not in known:
        ask = ["--memory-of", json.dumps({**asdict(setting), "patched": patched}), "--size", size, "--dtype", dtype]
        done = subprocess.run([sys.executable, __file__, *ask], stdout=subprocess.PIPE, text=True, check=True)
        known[key] = json.loads(done.stdout.splitlines()[-1])
    return known[key]


# ------------------------------------------------------------------ where the time goes


def profile(model: Any, setting: Setting, clock: Clock) -> list[dict]:
    """The prefill's parts, one row each: time, saving in arithmetic, and what the part keeps from the limit.

    "at_limit" is the unpatched time divided by the saving of that part; "lost" is what the patched one took beyond it.
    """
    inputs = make_inputs(model, setting)
    variants: list[Callable[[], Any]] = [nullcontext, lambda: pruning(model, setting)]
    hooks = [name for name in dir(Engine) if name.startswith(("before_", "after_", "around_"))]
    counts: list[dict[str, float]] = []
    samples: list[list[dict[str, float]]] = [[], []]
    with clock.time_functions(Engine, {name: f"patch, {name}" for name in hooks}):
        for variant in variants:
            with variant(), counted_flops(model) as flops:
                prefill(model, inputs)
            counts.append(dict(flops))
        for _ in range(setting.pairs):
            for variant, found in zip(variants, samples, strict=True):
                with variant():
                    clock.read()
                    clock.start("everything else")
                    prefill(model, inputs)
                    clock.stop()
                    found.append(clock.read())
    before, after = ({name: statistics.median(x[name] for x in found) for name in found[0]} for found in samples)
    rows = []
    for part in [*counts[0], *sorted((before.keys() | after.keys()) - counts[0].keys())]:
        saving = counts[0][part] / counts[1][part] if part in counts[0] else 1.0
        unpatched, patched = before.get(part, 0.0), after.get(part, 0.0)
        rows.append(
            {
                "metric": part,
                "unpatched": f"{unpatched:.6g}",
                "patched": f"{patched:.6g}",
                "limit": f"{saving:.4f}",
                "at_limit": f"{unpatched / saving:.6g}",
                "lost": f"{patched - unpatched / saving:.6g}",
                "pairs": setting.pairs,
            }
        )
    return rows


# ------------------------------------------------------------------ files


def describe(setting: Setting, options: argparse.Namespace) -> dict:
    """The columns that say what was measured, where and when."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(options.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lp_patch": lp_patch.__version__,
        "threads": torch.get_num_threads(),
        "model": setting.model,
        "size": options.size,
        "dtype": options.dtype,
        "images": setting.images,
        "batch": setting.batch,
        "visual_tokens": setting.visual,
        "budget": setting.tokens * setting.images,
        "scorer": setting.scorer,
        "new_tokens": new_tokens(options),
    }


def new_tokens(options: argparse.Namespace) -> int:
    """Tokens of one generation."""
    return 4 if options.quick else 16


def device_name(device: str) -> str:
    """What the user would call the machine."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def write(path: Path, rows: list[dict]) -> None:
    """Write the rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path) -> None:
    """Speed-up against the budget, from the CSV alone, into a PNG beside it."""
    with path.open(newline="") as file:
        rows = [x for x in csv.DictReader(file) if int(x["budget"]) < int(x["visual_tokens"])]
    series: dict[tuple, list[dict]] = {}
    for x in rows:
        series.setdefault((x["model"], int(x["visual_tokens"]), int(x["batch"]), x["scorer"]), []).append(x)
    styles = list(zip(colours.ALL, "os^Dv", strict=False))  # markers tell the series apart in print
    patterns = [(0, (4, 2)), (0, (1, 1.2)), (0, (6, 1, 1, 1))]
    dashes = dict(zip(dict.fromkeys(visual for _, visual, *_ in series), patterns, strict=False))
    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.3), sharey=True, layout="constrained")
    for i, ((model, visual, batch, scorer), found) in enumerate(series.items()):
        colour, marker = styles[i % len(styles)]
        for axes, metric in zip(panels, ("prefill", "generate"), strict=True):
            points = sorted((x for x in found if x["metric"] == metric), key=lambda x: int(x["budget"]))
            share = [100 * int(x["budget"]) / visual for x in points]
            ratio, low, high, limit = (
                [float(x[name]) for x in points] for name in ("ratio", "ratio_q1", "ratio_q3", "limit")
            )
            if metric == "prefill" and visual in dashes:  # the limit depends on the prompt alone
                label = f"limit, {visual:,} tokens"
                axes.plot(
                    share,
                    limit,
                    color="#4d4d4d",
                    linewidth=1,
                    linestyle=dashes.pop(visual),
                    marker="_" if len(points) == 1 else None,
                    label=label,
                    zorder=1,
                )
            bars = [[a - b for a, b in zip(ratio, low, strict=True)], [b - a for a, b in zip(ratio, high, strict=True)]]
            axes.errorbar(
                [x * 1.03 ** (i - (len(series) - 1) / 2) for x in share],  # side by side
                ratio,
                yerr=bars,
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=0,
                elinewidth=1,
                label=f"{NAMES[model]}, {visual:,} tokens, batch {batch}, {scorer}",
            )
    shares = sorted({round(100 * int(x["budget"]) / int(x["visual_tokens"]), 1) for x in rows})
    speeds = [2**i for i in range(8)]
    for axes, title in zip(panels, ("Prefill", f"Generation of {rows[0]['new_tokens']} tokens"), strict=True):
        axes.set_title(title, loc="left", weight="bold")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(shares, [f"{share}" for share in shares])
        axes.set_yticks(speeds, [f"{speed}x" for speed in speeds])
        axes.minorticks_off()
        axes.set_xlabel("visual tokens kept, average over the layers (%)")
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
    highest = max(float(x[name]) for x in rows for name in ("ratio_q3", "limit") if x["metric"] == "prefill")
    panels[0].set_ylim(0.9, 1.15 * highest)
    panels[0].set_ylabel("speed-up over the unpatched model")
    handles, labels = panels[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i].startswith("limit"))
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside lower center", ncols=3)
    figure.savefig(path.with_suffix(".png"), dpi=300)
    plt.close(figure)


def faster_dtype() -> str:
    """What this CPU multiplies matrices faster with, which depends on its instructions."""
    times = {}
    for name in ("float32", "bfloat16"):
        x, weight = (torch.ones(n, 1024, dtype=getattr(torch, name)) for n in (640, 1024))
        found = []
        for _ in range(10):
            start = time.process_time()
            x @ weight
            found.append(time.process_time() - start)
        times[name] = min(found)
    return min(times, key=times.__getitem__)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: another script, see above")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the faster one")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, few settings: seconds, numbers of no interest"
    )
    parser.add_argument("--profile", action="store_true", help="instead: where the prefill's time goes, part by part")
    parser.add_argument("--output", type=Path, help="CSV file; the plot goes beside it")
    parser.add_argument("--plot", type=Path, metavar="CSV", help="only draw the plot of an existing file again")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options, others = parser.parse_known_args()
    if options.device == "cuda":
        import benchmark_gpu

        benchmark_gpu.main()
        return
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    torch.set_num_threads(1)
    if options.plot:
        plot(options.plot)
        return
    if options.quick:
        options.size = "tiny"
    options.dtype = options.dtype or faster_dtype()
    dtype = getattr(torch, options.dtype)
    if options.memory_of:
        asked = json.loads(options.memory_of)
        patched, setting = asked.pop("patched"), Setting(**asked)
        print(json.dumps(peak_memory(build(setting.model, options.size, dtype), setting, patched)))
        return

    output = options.output or RESULTS / f"{'profile' if options.profile else 'benchmark'}_cpu.csv"
    memory_of = partial(in_fresh_process, options.size, options.dtype, {})
    clock = Clock()
    models: dict[str, Any] = {}
    rows: list[dict] = []
    with (
        clock.time_functions(early, {"stage1": "selection"}),
        clock.time_functions(choose, {"stage1": "selection"}),
        clock.time_functions(Forward, {"observe": "scoring"}),
    ):
        for setting in QUICK_SETTINGS if options.quick else SETTINGS:
            if setting.model not in models:
                model = models[setting.model] = build(setting.model, options.size, dtype)
                for name, modules in parts(model).items():
                    if options.profile or name == "vision_tower":
                        for module in modules:
                            clock.time_module(module, name)
            model = models[setting.model]
            if options.profile:
                found = profile(model, setting, clock)
            else:
                found = compare(model, setting, clock, new_tokens(options))
                # one setting for each prompt shows what there is to see
                if setting in (SETTINGS[0], SETTINGS[1], QUICK_SETTINGS[-1]):
                    found += equal_kv(model, setting, new_tokens(options) // 2)
                if setting.tokens == 32 and setting.scorer == "diversity" and setting.batch == 1:
                    found += compare_memory(memory_of, setting)
            about = describe(setting, options)
            print(
                "\n"
                + ", ".join(f"{name} {about[name]}" for name in ("model", "visual_tokens", "budget", "batch", "scorer"))
            )
            for x in found:
                print("  " + "  ".join(f"{name} {value}" for name, value in x.items() if value != ""), flush=True)
            rows += [{**about, **x} for x in found]
            write(output, rows)  # each time, so that a run that is stopped leaves what it had
    print(f"\nwrote {output}")
    if not options.profile:
        plot(output)
        print(f"wrote {output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
