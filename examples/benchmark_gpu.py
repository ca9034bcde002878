"""What a patch gains on a GPU, in one script that fits a few rented minutes: the rows that matter most come first.

    python examples/benchmark_gpu.py --output examples/results/benchmark_gpu.csv --seconds 420

Random weights in the shapes of real checkpoints, bfloat16. Variants of one setting alternate in one process, and each
value is a median; a row is written as soon as it is known. Variants: "stock" and "patched" run as they come,
"stock graphs" and "patched graphs" (`apply(compile=True)`) in CUDA graphs alike, vision tower and decoder layers. Parts
that would start after `--seconds` are left out, and said so. On another device everything is small, and nothing
in graphs: a rehearsal.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import lp_patch
from lp_patch.compat import CACHE
from lp_patch.regions import Region

TEXT = (36, 24)  # text tokens before and after the images: LLaVA-1.5's system prompt and a short question
COLUMNS = [
    "model", "visual_tokens", "kept", "batch", "scorer", "metric", "variant", "value", "unit", "runs", "spread",
    "device", "torch", "transformers", "lp_patch", "date",
]  # fmt: skip


class Sheet:
    """A CSV file whose rows are on disk at once, and the clock of the whole run."""

    def __init__(self, path: Path, seconds: float, device: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, COLUMNS, lineterminator="\n")
        self.writer.writeheader()
        self.start, self.seconds = time.perf_counter(), seconds
        name = torch.cuda.get_device_name() if device == "cuda" else device
        self.about = {
            "device": name,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lp_patch": lp_patch.__version__,
            "date": date.today().isoformat(),
        }
        self.setting: dict[str, Any] = {}

    def row(self, metric: str, variant: str, value: float, unit: str, runs: int = 1, spread: float = 0.0) -> None:
        """One figure."""
        found = {"metric": metric, "variant": variant, "value": f"{value:.4g}", "unit": unit, "runs": runs}
        self.writer.writerow({**self.setting, **found, "spread": f"{spread:.3g}", **self.about})
        self.file.flush()
        print(f"{self.left():5.0f}s left  {self.setting}  {metric}: {variant} {value:.4g} {unit}", flush=True)

    def left(self) -> float:
        """Seconds until no part starts any more."""
        return self.seconds - (time.perf_counter() - self.start)

    @contextmanager
    def part(self, name: str, needs: float):
        """A part that takes about `needs` seconds; one that fails costs its own rows only, and says so."""
        if self.left() < needs:
            print(f"left out for want of time: {name}", flush=True)
            yield False
            return
        try:
            yield True
        except Exception as error:  # a rented minute is not to be lost to one part
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
            self.row(f"failed: {name}", type(error).__name__, float("nan"), "")


def build(kind: str, device: str) -> nn.Module:
    """A model of the real shapes with random weights; small ones off the GPU."""
    real = device == "cuda"
    clip = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    llama = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    if not real:
        clip = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        llama = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**clip, image_size=336, patch_size=14, projection_dim=clip["hidden_size"])
    text = LlamaConfig(**llama, vocab_size=32064, max_position_embeddings=8192, pad_token_id=0)
    if kind == "llava":
        config: Any = LlavaConfig(vision_config=vision, text_config=text, image_token_id=32000)
        cls: Any = LlavaForConditionalGeneration
    elif kind == "llava_next":
        config = LlavaNextConfig(vision_config=vision, text_config=text, image_token_id=32000)
        cls = LlavaNextForConditionalGeneration
    else:
        size = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        tower: dict[str, Any] = {}
        if not real:
            size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
            tower = {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "fullatt_block_indexes": [1],
            }
        rope = {"rope_type": "default", "mrope_section": [16, 24, 24] if real else [2, 3, 3], "rope_theta": 1e6}
        config = Qwen2_5_VLConfig(
            text_config={**size, "num_key_value_heads": 4, "rope_parameters": rope, "vocab_size": 152064},
            vision_config={**tower, "out_hidden_size": size["hidden_size"]},
        )
        cls = Qwen2_5_VLForConditionalGeneration
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = cls(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def prompt(model: nn.Module, kind: str, images: int = 1, batch: int = 1) -> dict[str, Tensor]:
    """Text, images, text."""
    generator = torch.Generator().manual_seed(0)
    token, device, dtype = model.config.image_token_id, model.device, model.dtype
    before, after = (torch.randint(3, 30000, (batch, n), generator=generator) for n in TEXT)
    if kind == "llava":
        pixels = torch.randn(batch * images, 3, 336, 336, generator=generator)
        more, count = {"pixel_values": pixels}, 576 * images
    elif kind == "llava_next":
        pixels = torch.randn(batch, 5, 3, 336, 336, generator=generator)
        more = {"pixel_values": pixels, "image_sizes": torch.tensor([[672, 672]] * batch)}
        count = 576 * 5 + 48  # four tiles of 24 x 24, a line break after each of 48 rows, and the whole
    else:
        grid = (64, 80) if device.type == "cuda" else (8, 8)  # patches; four of them make a token
        pixels = torch.randn(batch * grid[0] * grid[1], 3 * 2 * 14 * 14, generator=generator)
        more, count = (
            {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, *grid]] * batch)},
            grid[0] * grid[1] // 4,
        )
    image = torch.full((batch, count), token)
    if kind == "qwen2_5_vl":
        start, end = (
            torch.full((batch, 1), x) for x in (model.config.vision_start_token_id, model.config.vision_end_token_id)
        )
        image = torch.cat([start, image, end], dim=1)
    ids = torch.cat([before, image, after], dim=1)
    if kind == "qwen2_5_vl":
        more["mm_token_type_ids"] = (ids == token).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    return {name: x.to(device, dtype) if x.is_floating_point() else x.to(device) for name, x in inputs.items()}


def synchronize(device: str) -> None:
    """Wait for the device, where there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def alternate(variants: dict[str, Callable[[], Any]], device: str, runs: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each variant, in turn, at most `seconds` in all."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    end = time.perf_counter() + seconds
    for number in range(runs):
        if number >= 3 and time.perf_counter() > end:
            break
        for name, run in variants.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            found[name].append(1e3 * (time.perf_counter() - start))
    return found


def record(sheet: Sheet, metric: str, times: dict[str, list[float]], unit: str = "ms") -> None:
    """Medians, and the ratios of stock to each other variant of its kind."""
    for name, own in times.items():
        sheet.row(metric, name, statistics.median(own), unit, len(own), statistics.pstdev(own))
    for name, own in times.items():
        for base in ("stock", "stock graphs"):
            if name.startswith("patched") and base in times:
                pairs = [a / b for a, b in zip(times[base], own, strict=True)]
                sheet.row(f"{metric}, speed-up over {base}", name, statistics.median(pairs), "x", len(pairs))


def stock_graphs(model: nn.Module, kind: str, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """The unpatched prefill, its vision tower (where that can be captured) and its decoder layers in CUDA graphs."""
    base, head = model.model, model.lm_head
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    sizes = {name: inputs[name].clone() for name in ("image_sizes", "image_grid_thw") if name in inputs}
    mask = (ids == model.config.image_token_id)[..., None]

    def encode(given: dict[str, Tensor]) -> Tensor:
        features = base.get_image_features(pixel_values=given["pixels"], return_dict=True, **sizes).pooler_output
        return torch.cat(list(features)).flatten(0, -2)

    def layers(given: dict[str, Tensor]) -> Tensor:
        out = base.language_model(
            inputs_embeds=given["embeds"], position_ids=given["ids"], **{CACHE: DynamicCache(), "use_cache": True}
        )
        return out.last_hidden_state, out[CACHE]

    embeds = base.get_input_embeddings()(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None].expand(ids.shape)
    if kind == "qwen2_5_vl":
        positions = positions[None].expand(3, -1, -1)
    tower = None
    try:
        tower = Region({"pixels": pixels}, encode, [x for x in base.children() if x is not base.language_model], [])
    except RuntimeError as error:  # it waits for the device somewhere: as it comes, for both
        print(f"stock {kind}: encoding images is not captured: {str(error).splitlines()[0]:.150}", flush=True)
    decoder = Region({"embeds": embeds, "ids": positions}, layers, [base.language_model], [])

    def run() -> Any:
        features = encode({"pixels": pixels}) if tower is None else tower.replay({"pixels": pixels})
        merged = base.get_input_embeddings()(ids).masked_scatter(mask, features)
        hidden, cache = decoder.replay({"embeds": merged, "ids": positions})
        kept = [(x.keys.clone(), x.values.clone()) for x in cache.layers]
        return head(hidden[:, -1:]), kept

    return run


@torch.inference_mode()
def prefills(sheet: Sheet, model: nn.Module, inputs: dict, options: dict, kind: str, runs: int, graphs: bool) -> None:
    """Prefill: stock, patched, and both in graphs."""
    device = model.device.type

    def plain() -> Any:
        return model(**inputs, logits_to_keep=1, use_cache=True)

    patches: dict[str, Any] = {}

    def under(name: str, **more: Any) -> Callable[[], Any]:
        """Hooks stay on a variant's own copy of the handle: taken off and on outside the clock."""
        patches[name] = more
        return plain

    variants = {"stock": plain, "patched": under("patched")}
    if graphs:
        variants["patched graphs"] = under("patched graphs", compile=True)
        variants["stock graphs"] = stock_graphs(model, kind, inputs)
    found: dict[str, list[float]] = {name: [] for name in variants}
    kept: dict[str, Any] = {}
    # a patch is on for its own runs alone: blocks of three, in turn
    for block in range(max(1, runs // 3) + 1):
        for name, run in variants.items():
            if name in patches:
                kept[name] = lp_patch.apply(model, **options, **patches[name])
                run(), run()  # captures, allocations
            else:
                run()
            for _ in range(3 if block else 1):
                synchronize(device)
                start = time.perf_counter()
                run()
                synchronize(device)
                if block:
                    found[name].append(1e3 * (time.perf_counter() - start))
            if name in patches and block == 0:
                trace = kept[name].trace
                sheet.row(
                    "kept", name, sum(map(sum, trace.tokens_per_layer)) / len(trace.tokens_per_layer[0]), "tokens"
                )
                if name == "patched graphs":
                    for region in (
                        *kept[name]._engine.encoders.kept.values(),
                        *kept[name]._engine.languages.kept.values(),
                    ):
                        sheet.row("memory of a capture", name, region.bytes / 2**20, "MiB")
            if name in patches:
                kept[name].remove()
    record(sheet, "prefill", found)
    if graphs and kept["patched"].trace is not None:
        one, other = kept["patched"].trace, kept["patched graphs"].trace
        for stage in ("stage1", "stage2"):
            pairs = zip(getattr(one, stage), getattr(other, stage), strict=True)
            same = statistics.fmean(len(set(a.tolist()) & set(b.tolist())) / len(a) for a, b in pairs)
            sheet.row(f"{stage} kept alike, eager and graphs", "patched graphs", same, "share")


@torch.inference_mode()
def profile(sheet: Sheet, model: nn.Module, inputs: dict, options: dict) -> None:
    """Kernels, waits and the device's busy time of one prefill, by the profiler."""
    for name in ("stock", "patched"):
        patch = lp_patch.apply(model, **options) if name == "patched" else None
        model(**inputs, logits_to_keep=1, use_cache=True)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as seen:
            model(**inputs, logits_to_keep=1, use_cache=True)
            torch.cuda.synchronize()
        events = [x for x in seen.events() if x.device_type == torch.autograd.DeviceType.CUDA]
        sheet.row("kernels and copies of a prefill", name, len(events), "")
        sheet.row("device busy in a prefill", name, sum(x.device_time for x in events) / 1e3, "ms")
        waits = [x for x in seen.events() if x.name == "cudaStreamSynchronize"]
        sheet.row("waits of a prefill", name, len(waits), "")
        if patch is not None:
            patch.remove()


@torch.inference_mode()
def towers(sheet: Sheet, model: nn.Module, inputs: dict, options: dict, runs: int) -> None:
    """The vision side alone: what pruning after it cannot save."""
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    given = {name: inputs[name] for name in names if name in inputs}
    times = alternate({"stock": lambda: model.model.get_image_features(**given)}, model.device.type, runs, 10)
    record(sheet, "encoding images", times)


@torch.inference_mode()
def decoding(sheet: Sheet, model: nn.Module, inputs: dict, options: dict, new: int, cache: str) -> None:
    """A token of generate(), from when it is said to when the next is: dynamic cache, or a static one, compiled."""
    times: dict[str, list[float]] = {"stock": [], "patched": []}
    more = {"cache_implementation": "static"} if cache == "static" else {}

    def generate() -> list[float]:
        clock = Clock()
        model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=clock, **more)
        return clock.between()

    for _ in range(1 if cache == "static" else 3):  # with another patch a compiled step is compiled again
        for name, own in times.items():
            patch = lp_patch.apply(model, **options) if name == "patched" else None
            generate(), generate()
            own += [1e3 * x for _ in range(3) for x in generate()]
            if patch is not None:
                patch.remove()
    record(sheet, f"a decoded token, {cache} cache", times)


class Clock:
    """A streamer that looks at the clock."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        """A token, or the prompt first, is on the host."""
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""

    def between(self) -> list[float]:
        """Seconds between tokens, without the prompt and the first three, which may be compiled."""
        return [b - a for a, b in zip(self.at[4:-1], self.at[5:], strict=True)]


@torch.inference_mode()
def totals(sheet: Sheet, model: nn.Module, inputs: dict, options: dict, counts: tuple[int, ...]) -> None:
    """generate() from prompt to last token."""
    for new in counts:
        times: dict[str, list[float]] = {}
        for name, more in (("stock", None), ("patched", {}), ("patched graphs", {"compile": True})):
            patch = None if more is None else lp_patch.apply(model, **options, **more)
            own = times[name] = []
            for number in range(6 if new < 64 else 4):
                synchronize(model.device.type)
                start = time.perf_counter()
                model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
                synchronize(model.device.type)
                if number >= 2:
                    own.append(1e3 * (time.perf_counter() - start))
            if patch is not None:
                patch.remove()
        record(sheet, f"generate, {new} new tokens", times)


@torch.inference_mode()
def memory(sheet: Sheet, model: nn.Module, inputs: dict, options: dict) -> None:
    """Peak memory beside the weights, and how many requests' caches fit into what is left."""
    total = torch.cuda.get_device_properties(0).total_memory
    for name in ("stock", "patched"):
        patch = lp_patch.apply(model, **options) if name == "patched" else None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = model(**inputs, logits_to_keep=1, use_cache=True)
        cache = sum(x.keys.nbytes + x.values.nbytes for x in out[CACHE].layers)
        sheet.row(
            "peak memory of a prefill beside the weights",
            name,
            (torch.cuda.max_memory_allocated() - before) / 2**20,
            "MiB",
        )
        sheet.row("KV cache after a prefill", name, cache / 2**20, "MiB")
        sheet.row(
            "requests whose caches fit beside the weights",
            name,
            (total - before) // (cache / len(inputs["input_ids"])),
            "",
        )
        del out
        if patch is not None:
            patch.remove()


def main() -> None:
    """All parts, in the order of what they are worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "benchmark_gpu.csv")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", default=[], help="parts whose names hold one of these words")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    sheet = Sheet(args.output, args.seconds, args.device)

    def wanted(name: str) -> bool:
        return not args.only or any(word in name or name in word for word in args.only)

    def setting(kind: str, count: int, kept: int, batch: int, scorer: str) -> dict[str, Any]:
        sheet.setting = {"model": kind, "visual_tokens": count, "kept": kept, "batch": batch, "scorer": scorer}
        options: dict[str, Any] = {"tokens": kept, "scorer": scorer}
        if scorer in ("learned", "covering"):
            width = 1024 if cuda else 32
            options["pruner"] = lp_patch.LearnablePruner(width).to(args.device)
        return options

    def run(name: str, needs: float, work: Callable[[], None]) -> None:
        if wanted(name):
            with sheet.part(name, needs) as go:
                if go:
                    work()
            if cuda:
                torch.cuda.empty_cache()

    there: dict[str, Any] = {}

    def of(kind: str, batch: int = 1) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model of a kind, alone in memory, and a prompt for it."""
        if kind not in there:
            there.clear()
            if cuda:
                torch.cuda.empty_cache()
            there[kind] = build(kind, args.device)
        return there[kind], prompt(there[kind], kind, batch=batch)

    names = {
        "llava": ("LLaVA-1.5-7B", 576),
        "llava_next": ("LLaVA-NeXT-7B", 2880),
        "qwen2_5_vl": ("Qwen2.5-VL-7B", 1280),
    }

    def part(kind: str, what: str, needs: float, work: Callable[..., None], kept: int, *more: Any, **set_: Any) -> None:
        """`work` on a model, a prompt and options; more arguments follow."""
        batch, scorer = set_.get("batch", 1), set_.get("scorer", "diversity")
        name, count = names[kind]
        options = setting(name, count, kept if cuda or kind != "qwen2_5_vl" else 4, batch, scorer)
        run(f"{kind} {what}", needs, lambda: work(sheet, *of(kind, batch), options, *more))

    for kept, scorer in ((32, "diversity"), (32, "learned"), (64, "diversity")):
        part("llava", f"prefill {kept} {scorer}", 15, prefills, kept, "llava", args.runs, cuda, scorer=scorer)
    part("llava", "tower", 3, towers, 32, args.runs)
    if cuda:
        part("llava", "profile", 10, profile, 32)
        part("llava", "memory", 5, memory, 32)
    for kind, kept in (("llava_next", 160), ("qwen2_5_vl", 142)):
        part(kind, "prefill", 25, prefills, kept, kind, args.runs, cuda)
        part(kind, "totals", 20, totals, kept, (2,))
        part(kind, "tower", 5, towers, kept, 9)
        if cuda:
            part(kind, "profile", 10, profile, kept)
            part(kind, "memory", 5, memory, kept)
    part("llava", "decode dynamic", 15, decoding, 32, 32, "dynamic")
    part("llava", "decode static", 80, decoding, 32, 64, "static")
    part("llava", "totals", 40, totals, 32, (2, 16, 128))
    for batch in (8, 16):
        part("llava", f"batch {batch}", 15, prefills, 32, "llava", 9, False, batch=batch)
    print(f"done, {sheet.left():.0f} s to spare", flush=True)


if __name__ == "__main__":
    main()
