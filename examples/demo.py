"""Ask a small trained LLaVA about a picture, with and without the patch; print what changed and draw what was kept.

``python examples/demo.py`` needs no network: model, picture and questions lie in ``examples/testbed``. It draws into
``runs/``; ``--output examples/results/demo.png`` makes the README's picture anew.
"""

import argparse
import json
import statistics
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import lp_patch
from lp_patch.compat import CACHE

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.collections import LineCollection

HERE = Path(__file__).resolve().parent
# Okabe and Ito's colour-blind-safe palette
INK, MUTED, STAGE_1, STAGE_2 = "#1a1a1a", "#6b6b6b", "#0072b2", "#d55e00"


@dataclass
class Answer:
    """One question, answered with or without the patch; times in seconds, the cache in bytes."""

    text: str = ""
    kv_bytes: int = 0
    prefill: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)


def ask(model: torch.nn.Module, processor, inputs: dict, answer: Answer) -> None:
    """Answer once: a timed prefill, then a timed generation from the start."""
    start = time.perf_counter()
    model(**inputs, logits_to_keep=1)
    answer.prefill.append(time.perf_counter() - start)
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    answer.total.append(time.perf_counter() - start)
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    answer.text = processor.decode(new, skip_special_tokens=True).strip()
    answer.kv_bytes = sum(x.untyped_storage().nbytes() for y in output[CACHE].layers for x in (y.keys, y.values))


def prompt(processor, image: Image.Image, question: str) -> dict:
    """One question about one picture, in the checkpoint's own chat format."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@torch.inference_mode()
def compare(
    model: torch.nn.Module, processor, inputs: dict, tokens: int, runs: int, pruner: str | None = None
) -> tuple[Answer, Answer, lp_patch.Trace]:
    """Ask without and with the patch in turn, `runs` times each, after a warm-up that does not count."""
    full, pruned = Answer(), Answer()
    for run in range(runs + 1):
        ask(model, processor, inputs, full)
        with lp_patch.applied(model, tokens=tokens, pruner=pruner) as patch:
            ask(model, processor, inputs, pruned)
            trace = patch.trace
        if run == 0:
            for answer in (full, pruned):
                answer.prefill.clear()
                answer.total.clear()
    return full, pruned, trace


def table(question: dict, full: Answer, pruned: Answer, trace: lp_patch.Trace) -> str:
    """The comparison as text."""
    per_layer = trace.tokens_per_layer[0]
    stages = ", ".join(
        f"{n} in layers {per_layer.index(n) + 1}-{len(per_layer) - per_layer[::-1].index(n)}"
        for n in dict.fromkeys(per_layer)
    )
    rows = [
        ("answer", full.text, pruned.text, ""),
        ("visual tokens", str(trace.visual_tokens[0]), stages, ""),
    ]
    for name, a, b in (("prefill", full.prefill, pruned.prefill), ("total", full.total, pruned.total)):
        slow, fast = statistics.median(a), statistics.median(b)
        rows.append((name, f"{1e3 * slow:.1f} ms", f"{1e3 * fast:.1f} ms", f"{slow / fast:.2f}x faster"))
    ratio = f"{full.kv_bytes / pruned.kv_bytes:.2f}x smaller"
    rows.append(("KV cache", f"{full.kv_bytes / 1024:.0f} KiB", f"{pruned.kv_bytes / 1024:.0f} KiB", ratio))
    lines = [f"{question['question']}  (truth: {question['answer']})"]
    lines += [f"  {name:<14} {a:>12}   {b:<36} {note}".rstrip() for name, a, b, note in rows]
    return "\n".join(lines)


def seen_picture(processor, pixels: torch.Tensor) -> np.ndarray:
    """The picture as the model sees it, cropped and scaled: (3, H, W) normalised -> (H, W, 3) in [0, 1]."""
    images = processor.image_processor
    mean, std = np.array(images.image_mean), np.array(images.image_std)
    return (pixels.float().cpu().numpy().transpose(1, 2, 0) * std + mean).clip(0, 1)


def draw_kept(axes: plt.Axes, picture: np.ndarray, kept: list[int], grid: int, colour: str) -> None:
    """The picture with its removed patches faded, and a line around what is kept."""
    mask = np.zeros(grid * grid, dtype=bool)
    mask[kept] = True
    mask = mask.reshape(grid, grid)
    size = picture.shape[0] // grid
    cells = np.kron(mask, np.ones((size, size), dtype=bool))[..., None]
    grey = picture.mean(axis=-1, keepdims=True)
    axes.imshow(np.where(cells, picture, 0.8 + 0.2 * grey), interpolation="lanczos")
    padded = np.pad(mask, 1)
    sides = []
    for row, column in zip(*np.nonzero(padded[:, 1:] != padded[:, :-1]), strict=True):
        sides.append([(column, row - 1), (column, row)])
    for row, column in zip(*np.nonzero(padded[1:] != padded[:-1]), strict=True):
        sides.append([(column - 1, row), (column, row)])
    lines = [[(x * size - 0.5, y * size - 0.5) for x, y in side] for side in sides]
    axes.add_collection(LineCollection(lines, colors=colour, linewidths=0.8, capstyle="projecting"))


def draw_mixed(axes: plt.Axes, picture: np.ndarray, weights: np.ndarray, places: list[int], grid: int) -> None:
    """The picture, each patch the fainter the less of it is in any mixture, and a dot where each mixture stands.

    `weights` (R1, N): nothing is kept as it was, so that there is no line to draw around it.
    """
    share = weights.sum(axis=0).reshape(grid, grid)
    size = picture.shape[0] // grid
    shown = np.kron((share / share.max()) ** 0.5, np.ones((size, size)))[..., None]
    grey = 0.8 + 0.2 * picture.mean(axis=-1, keepdims=True)
    axes.imshow(shown * picture + (1 - shown) * grey, interpolation="lanczos")
    rows, columns = np.divmod(np.array(places), grid)
    axes.scatter((columns + 0.5) * size, (rows + 0.5) * size, s=2, color=STAGE_1, linewidths=0)


def draw(picture: np.ndarray, grid: int, results: list[tuple], path: Path) -> None:
    """Picture, stage 1, and stage 2 per question, side by side; `results` holds (question, full, pruned, trace)."""
    first = results[0][3]
    # title, colour, token count, patches to show (None: all), caption lines, caption lines of less weight
    panels = [
        ("Picture", INK, f"{first.visual_tokens[0]} tokens", None, [], []),
        ("Stage 1", STAGE_1, f"{len(first.stage1[0])} tokens", first.stage1[0], [], ["before any question is read"]),
    ]
    for question, full, pruned, trace in results:
        kept, asked = trace.stage2[0], textwrap.wrap(question["question"], 32)
        panels.append(
            ("Stage 2", STAGE_2, f"{len(kept)} tokens", kept, asked, [f"{pruned.text} (unpruned: {full.text})"])
        )

    rows = -(-len(panels) // 5)
    columns = -(-len(panels) // rows)
    side, gap, head, line = 1.9, 0.16, 0.34, 0.15  # inches
    foot = 0.08 + line * max(len(upper) + len(lower) for *_, upper, lower in panels)
    width, height = columns * (side + gap) + gap, rows * (side + head + foot) + gap
    plt.rcParams.update({"font.size": 7.5, "text.color": INK})
    figure = plt.figure(figsize=(width, height), facecolor="white")
    for number, (title, colour, count, kept, upper, lower) in enumerate(panels):
        row, column = divmod(number, columns)
        left, top = gap + column * (side + gap), height - row * (side + head + foot) - head
        axes = figure.add_axes((left / width, (top - side) / height, side / width, side / height))
        axes.set_axis_off()
        if kept is None:
            axes.imshow(picture, interpolation="lanczos")
        else:
            mixtures = first.mixtures[0]
            if mixtures is None:
                draw_kept(axes, picture, kept.tolist(), grid, colour)
            else:
                own = torch.isin(first.stage1[0], kept)
                draw_mixed(axes, picture, mixtures[own].numpy(), kept.tolist(), grid)
        axes.text(0, 1.03, title, transform=axes.transAxes, weight="bold", color=colour)
        if kept is not None and first.mixtures[0] is not None:
            count = count.replace("tokens", "mixtures")
        axes.text(1, 1.03, count, transform=axes.transAxes, color=MUTED, ha="right")
        for i, text in enumerate([*upper, *lower]):
            ink = INK if i < len(upper) else MUTED
            axes.text(0, -(0.06 + i * line) / side, text, transform=axes.transAxes, color=ink, va="top")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=300)
    plt.close(figure)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=HERE / "testbed" / "model", help="LLaVA checkpoint: folder or Hub id")
    parser.add_argument("--picture", type=Path, default=HERE / "testbed" / "demo.png")
    parser.add_argument("--questions", type=Path, default=HERE / "testbed" / "demo.json")
    parser.add_argument("--tokens", type=int, default=64, help="visual tokens, averaged over the decoder layers")
    parser.add_argument(
        "--pruner", help="trained weights of any kind: folder or Hub id (default: the checkpoint's own)"
    )
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each variant")
    parser.add_argument("--output", type=Path, default=Path("runs") / "demo.png")
    options = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(options.model).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    image = Image.open(options.picture).convert("RGB")
    questions = json.loads(options.questions.read_text())["questions"]

    parameters = sum(x.numel() for x in model.parameters())
    print(
        f"{parameters / 1e6:.1f} M parameters, {model.dtype}, {model.device}, {torch.get_num_threads()} threads; "
        f"times are medians of {options.runs} runs, without and with the patch in turn\n"
    )
    results = []
    for question in questions:
        inputs = prompt(processor, image, question["question"]).to(model.device, model.dtype)
        full, pruned, trace = compare(model, processor, inputs, options.tokens, options.runs, options.pruner)
        results.append((question, full, pruned, trace))
        print(table(question, full, pruned, trace), end="\n\n")
    vision = model.config.vision_config
    draw(
        seen_picture(processor, inputs["pixel_values"][0]),
        vision.image_size // vision.patch_size,
        results,
        options.output,
    )
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
