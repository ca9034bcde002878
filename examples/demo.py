"""Ask a small trained LLaVA about a picture, with and without the patch; print what changed and draw what was kept.

``python examples/demo.py`` needs no network: model, picture and questions lie in ``examples/testbed``. It draws into
``runs/``; ``--output examples/results/demo.png`` makes the README's picture anew.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import lp_patch
from lp_patch import show
from lp_patch.compat import CACHE
from lp_patch.loading import ask as ask_about

HERE = Path(__file__).resolve().parent


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


@torch.inference_mode()
def compare(
    model: torch.nn.Module, processor, image: Image.Image, inputs: dict, tokens: int, runs: int
) -> tuple[Answer, Answer, lp_patch.Trace, list[show.Panel]]:
    """Ask without and with the patch in turn, `runs` times each, after a warm-up that does not count."""
    full, pruned = Answer(), Answer()
    for run in range(runs + 1):
        ask(model, processor, inputs, full)
        with lp_patch.applied(model, tokens=tokens) as patch:
            ask(model, processor, inputs, pruned)
            trace = patch.trace
            if run == runs:
                (panels,) = patch.panels(image, processor=processor)
        if run == 0:
            for answer in (full, pruned):
                answer.prefill.clear()
                answer.total.clear()
    return full, pruned, trace, panels


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


def draw(results: list[tuple[dict, Answer, Answer, list[show.Panel]]], path: Path) -> None:
    """The picture and stage 1; below, two questions a row, what stage 2 thought of each token and what it kept."""
    cells = []
    for question, full, pruned, panels in results:
        scores, kept = panels[-2:]
        cells.append(replace(scores, captions=(question["question"],)))
        cells.append(replace(kept, captions=(f"{pruned.text} (unpruned: {full.text})",)))
    rows = [cells[i : i + 4] for i in range(0, len(cells), 4)]
    show.draw([results[0][3][:-2], *rows], path=path)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=HERE / "testbed" / "model", help="LLaVA checkpoint: folder or Hub id")
    parser.add_argument("--picture", type=Path, default=HERE / "testbed" / "demo.png")
    parser.add_argument("--questions", type=Path, default=HERE / "testbed" / "demo.json")
    parser.add_argument("--tokens", type=int, default=64, help="visual tokens, averaged over the decoder layers")
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
        inputs = ask_about(processor, image, question["question"]).to(model.device, model.dtype)
        full, pruned, trace, panels = compare(model, processor, image, inputs, options.tokens, options.runs)
        results.append((question, full, pruned, panels))
        print(table(question, full, pruned, trace), end="\n\n")
    draw(results, options.output)
    print(
        f"wrote {options.output}: what each stage kept, and the scores that stage 2 went by\n\n"
        "Next, on a model of yours:\n"
        "  lp-patch check MODEL                                does it fit, where would it cut\n"
        "  lp-patch show MODEL PICTURE QUESTION out.png        the like of this picture\n"
        "  lp-patch bench MODEL                                what it gains on this machine\n"
        "(from this folder: .venv/bin/lp-patch)"
    )


if __name__ == "__main__":
    main()
