"""Stages 2 and 3: cache the frozen tower's features, then train the projector and the language model.

All questions about a picture share one visual prefix.  A question sees the prefix and itself, nothing else,
at the positions that it would have alone: exactly the single-turn prompt (``check`` compares with the stock
model).
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import network
import numpy as np
import questions
import torch
import torch.nn.functional as F
from network import DEVICE, HEADS, PATCHES, TEXT, TEXT_LAYERS, VISION, Master, encode, normalise
from questions import Question
from scenes import IGNORE, SceneSet
from torch import Tensor, nn
from tower import KIND_TOKENS, TOKEN, Trainee
from transformers import LlavaForConditionalGeneration

TOKENIZER = network.tokenizer()
PREFIX = TOKENIZER("USER:").input_ids
HEAD = TEXT // HEADS
POINT_LAYER = 1
READ_LAYER = 3
SIZE_GAIN = 4.0
PLACE_GAIN = 3.0
_SPLIT: dict[tuple[str, str], tuple[list[int], list[int]]] = {}


def split(question: Question) -> tuple[list[int], list[int]]:
    """Token ids of the prompt after the picture, and of the answer with its end."""
    key = (question.text, question.answer)
    if key not in _SPLIT:
        prompt = TOKENIZER(question.text + " ASSISTANT:", add_special_tokens=False).input_ids
        answer = TOKENIZER(question.answer, add_special_tokens=False).input_ids
        _SPLIT[key] = (prompt, [*answer, TOKEN["</s>"]])
    return _SPLIT[key]


@dataclass
class Batch:
    """Questions of several pictures, each padded to one length."""

    tokens: Tensor  # (B, Q, T)
    targets: Tensor  # (B, Q, T), -100 where nothing is to be predicted
    pointer: Tensor  # (B, Q) index of the pointing word
    asker: Tensor  # (B, Q) index of the last prompt token
    patches: Tensor  # (B, Q, 576) relevant patches
    shares: Tensor  # (B, Q, 577) target of the counting head: the start token, then the patches
    real: Tensor  # (B, Q) which questions are no padding
    questions: list[list[Question]]


def collate(asked: list[list[Question]], instances: np.ndarray) -> Batch:
    """Pad and stack questions; ``instances`` is (B, 576)."""
    rows = len(asked)
    most = max(map(len, asked))
    longest = max(len(prompt) + len(answer) - 1 for row in asked for prompt, answer in map(split, row))
    tokens = torch.zeros(rows, most, longest, dtype=torch.long)
    targets = torch.full((rows, most, longest), -100)
    pointer = torch.zeros(rows, most, dtype=torch.long)
    asker = torch.zeros(rows, most, dtype=torch.long)
    patches = torch.zeros(rows, most, PATCHES)
    shares = torch.zeros(rows, most, PATCHES + 1)
    real = torch.zeros(rows, most, dtype=torch.bool)
    for row, column_questions in enumerate(asked):
        for column, question in enumerate(column_questions):
            prompt, answer = split(question)
            both = prompt + answer[:-1]
            tokens[row, column, : len(both)] = torch.tensor(both)
            targets[row, column, len(prompt) - 1 : len(both)] = torch.tensor(answer)
            pointer[row, column] = prompt.index(TOKEN[question.pointer])
            asker[row, column] = len(prompt) - 1
            real[row, column] = True
            share = 1 / (1 + len(question.relevant))
            shares[row, column, 0] = share
            for index in question.relevant:
                body = torch.from_numpy(instances[row] == index + 1).float()
                patches[row, column] += body
                shares[row, column, 1:] += share * body / body.sum().clamp(min=1)
    tensors = (tokens, targets, pointer, asker, patches, shares, real)
    return Batch(*(tensor.to(DEVICE) for tensor in tensors), questions=asked)


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions in the layout of the stock Llama."""
    first, second = states.chunk(2, -1)
    return states * cosine + torch.cat([-second, first], -1) * sine


def forward(
    model: LlavaForConditionalGeneration, visual: Tensor, kept: Tensor, batch: Batch, watch: bool = False
) -> tuple[Tensor, dict[int, Tensor]]:
    """Final hidden states (B, Q, T, D) of the questions; with ``watch`` their attention to the prefix too.

    ``visual`` holds the projected features of the patches in ``kept`` (B, K), in raster order.
    """
    llama = model.model.language_model
    rows, count, length = batch.tokens.shape
    head = len(PREFIX)
    start = llama.embed_tokens(torch.tensor(PREFIX, device=visual.device)).expand(rows, -1, -1)
    prefix = torch.cat([start.to(visual.dtype), visual], 1)
    size = prefix.shape[1]
    asked = llama.embed_tokens(batch.tokens).flatten(1, 2)
    where = torch.cat([torch.arange(head, device=visual.device).expand(rows, -1), kept + head], 1)
    after = (head + PATCHES + torch.arange(length, device=visual.device)).repeat(count).expand(rows, -1)
    cosine, sine = llama.rotary_emb(prefix, torch.cat([where, after], 1))
    cosine, sine = cosine[:, None], sine[:, None]
    causal = torch.full((length, length), float("-inf"), device=visual.device, dtype=visual.dtype).triu(1)
    own = causal.expand(rows, HEADS, count, length, length)
    hidden = torch.cat([prefix, asked], 1)
    attention: dict[int, Tensor] = {}
    for number, layer in enumerate(llama.layers[:TEXT_LAYERS]):
        last = number == TEXT_LAYERS - 1
        block = layer.self_attn
        normed = layer.input_layernorm(hidden)
        shape = (rows, -1, HEADS, HEAD)
        key = _rotate(block.k_proj(normed).view(shape).transpose(1, 2), cosine, sine)
        value = block.v_proj(normed).view(shape).transpose(1, 2)
        asking = normed[:, size:] if last else normed
        offset = size if last else 0
        query = _rotate(block.q_proj(asking).view(shape).transpose(1, 2), cosine[:, :, offset:], sine[:, :, offset:])
        seen = query[:, :, size - offset :] * HEAD**-0.5
        far = seen @ key[:, :, :size].transpose(-1, -2)
        fold = (rows, HEADS, count, length, HEAD)
        near = seen.view(fold) @ key[:, :, size:].reshape(fold).transpose(-1, -2) + own
        weights = torch.cat([far, near.flatten(2, 3)], -1).softmax(-1, dtype=torch.float32)
        if watch and number in (POINT_LAYER, READ_LAYER):
            attention[number] = weights.view(rows, HEADS, count, length, -1)
        weights = weights.to(visual.dtype)
        mixed = weights[..., :size] @ value[:, :, :size]
        close = weights[..., size:].reshape(rows, HEADS, count, length, length) @ value[:, :, size:].reshape(fold)
        mixed = mixed + close.flatten(2, 3)
        if not last:
            early = F.scaled_dot_product_attention(
                query[:, :, :size], key[:, :, :size], value[:, :, :size], is_causal=True
            )
            mixed = torch.cat([early, mixed], 2)
        hidden = hidden[:, offset:] + block.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return llama.norm(hidden).view(rows, count, length, -1), attention


@torch.no_grad()
def amplify(projector: nn.Module, trainee: Trainee) -> None:
    """Bring place and size to the scale of the kinds in the projected features: they are learned sooner."""
    words = trainee.words.detach().float()
    directions = {
        SIZE_GAIN: [trainee.size.detach().float()],
        PLACE_GAIN: [
            words[TOKEN["right"]] - words[TOKEN["left"]],
            words[TOKEN["bottom"]] - words[TOKEN["top"]],
        ],
    }
    for gain, several in directions.items():
        for direction in several:
            unit = direction / direction.norm()
            for parameter in (projector.linear_2.weight, projector.linear_2.bias):
                value = parameter.float()
                parameter.copy_(value + (gain - 1) * torch.tensordot(unit, unit @ value, 0))


def start_from(trainee: Trainee) -> LlavaForConditionalGeneration:
    """A model with the trained tower and projector and the tower's word vectors as embeddings."""
    model = network.build()
    network.vision_transformer(model).load_state_dict(trainee.vision.state_dict())
    model.model.multi_modal_projector.load_state_dict(trainee.projector.state_dict())
    amplify(model.model.multi_modal_projector, trainee)
    llama = model.model.language_model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        table = trainee.words.detach().float().cpu().clone()
        table[KIND_TOKENS] /= table[KIND_TOKENS].norm(dim=1).mean()
        llama.embed_tokens.weight.copy_(table)
        model.lm_head.weight.copy_(table)
        for layer in llama.layers[:3]:
            for number in (0, 1):
                rows = slice(number * HEAD, (number + 1) * HEAD)
                basis = torch.linalg.qr(torch.randn(TEXT, HEAD, generator=generator))[0].T * 0.9
                layer.self_attn.q_proj.weight[rows] = basis
                layer.self_attn.k_proj.weight[rows] = basis
    return model


@torch.no_grad()
def features(vision: nn.Module, scenes: SceneSet, path: Path | None) -> Tensor:
    """Layer -2 patch features of a set, bf16 (N, 576, D), kept in a file."""
    count = len(scenes)
    if path is not None and path.exists():
        return torch.load(path, mmap=True)
    result = torch.empty(count, PATCHES, VISION, dtype=torch.bfloat16)
    positions = torch.arange(PATCHES, device=DEVICE)
    began = time.time()
    for start in range(0, count, 32):
        pictures = torch.from_numpy(np.array(scenes.pictures[start : start + 32])).to(DEVICE)
        hidden = encode(vision, normalise(pictures), positions.expand(len(pictures), -1))
        result[start : start + 32] = hidden[:, 1:].cpu()
        if start % 1024 == 0:
            print(f"cache {start}/{count} {time.time() - began:.0f} s", flush=True)
    if path is not None:
        torch.save(result, path)
    return result


def grounding(attention: dict[int, Tensor], batch: Batch, kept: Tensor) -> Tensor:
    """Point with a word at its patches, spread it evenly over the objects and the start token, read from it.

    The first puts the word's attention on its patches, or on the start token where there are none.  The
    second leaves 1 / (1 + n) on the start token, so that the number n can be read.  The third lets the
    answer look at the word.
    """
    rows, questions_index = batch.real.nonzero(as_tuple=True)
    head = len(PREFIX)
    size = head + kept.shape[1]
    pointer = batch.pointer[rows, questions_index]
    point = attention[POINT_LAYER][rows, :, questions_index, pointer]
    chosen = kept[rows]
    relevant = batch.patches[rows, questions_index].gather(1, chosen)
    none = relevant.sum(1) == 0
    mass = (point[:, 0, head:size] * relevant).sum(1) + point[:, 0, 0] * none
    loss = -(mass + 1e-3).log().mean()
    target = batch.shares[rows, questions_index]
    target = torch.cat([target[:, :1], target[:, 1:].gather(1, chosen)], 1)
    target = target / target.sum(1, keepdim=True)
    given = torch.cat([point[:, 1, :1], point[:, 1, head:size]], 1)
    loss = loss + 4 * (target * ((target + 1e-6).log() - (given + 1e-6).log())).sum(1).mean()
    asker = batch.asker[rows, questions_index]
    read = attention[READ_LAYER][rows, 0, questions_index, asker]
    return loss - 0.5 * (read.gather(1, size + pointer[:, None]) + 1e-3).log().mean()


def choose(labels: np.ndarray, keep: int, rng: np.random.Generator) -> Tensor:
    """All patches, or all foreground and random background ones up to ``keep`` (early training only)."""
    rows = len(labels)
    if keep >= PATCHES:
        return torch.arange(PATCHES).expand(rows, -1)
    solid = (labels[:, 0] > 0) & (labels[:, 0] < IGNORE)
    score = rng.random((rows, PATCHES)) + 2 * (labels[:, 2] > 12) + 2 * solid
    return torch.from_numpy(np.sort(np.argsort(-score, 1)[:, :keep], 1))


def tally(hits: Tensor, asked: list[list[Question]], counts: dict[str, list[int]]) -> None:
    """Add right answers by type (existence by answer)."""
    for row, some in enumerate(asked):
        for column, question in enumerate(some):
            name = f"{question.type} {question.answer}" if question.type == "existence" else question.type
            entry = counts.setdefault(name, [0, 0])
            entry[0] += int(hits[row, column])
            entry[1] += 1


def by_type(counts: dict[str, list[int]]) -> str:
    """Right answers in %, by type."""
    right, total = (sum(entry[i] for entry in counts.values()) for i in (0, 1))
    parts = " ".join(f"{name} {100 * entry[0] / entry[1]:.1f}" for name, entry in sorted(counts.items()))
    return f"all {100 * right / total:.1f} ({total}) {parts}"


def answer(model: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss over the answer tokens, and which questions are answered exactly."""
    wanted = targets >= 0
    logits = model.lm_head(hidden[wanted]).float()
    truth = targets[wanted]
    loss = F.cross_entropy(logits, truth)
    wrong = torch.zeros_like(wanted)
    wrong[wanted] = logits.argmax(-1) != truth
    return loss, ~wrong.any(-1)


@torch.no_grad()
def monitor(model: LlavaForConditionalGeneration, cached: Tensor, scenes: SceneSet, count: int) -> str:
    """Teacher-forced exact match on held-out scenes with every token."""
    draw = random.Random(7)
    counts: dict[str, list[int]] = {}
    for start in range(0, count, 16):
        stop = min(start + 16, count)
        objects = scenes.objects[start:stop]
        asked = questions.balanced(objects, draw)
        batch = collate(asked, scenes.labels[start:stop, 1])
        kept = torch.arange(PATCHES, device=DEVICE).expand(stop - start, -1)
        visual = model.model.multi_modal_projector(cached[start:stop].to(DEVICE))
        hidden, _ = forward(model, visual, kept, batch)
        tally(answer(model, hidden, batch.targets)[1], asked, counts)
    return by_type(counts)


@dataclass(frozen=True)
class Phase:
    """Minutes on so many tokens at a batch size, from one learning rate to another."""

    minutes: float
    tokens: int
    pictures: int
    first: float
    last: float
    grounding: tuple[float, float] = (0.0, 0.0)
    gentle: bool = False


def train(
    trainee: Trainee, scenes: SceneSet, held_out: dict[str, SceneSet], folder: Path, phases: list[Phase]
) -> LlavaForConditionalGeneration:
    """Train through the phases; resumes from the last checkpoint."""
    trainee.requires_grad_(False)
    cached = features(trainee.vision, scenes, folder / "features.pt")
    watched = {
        name: features(trainee.vision, some, folder / f"features_{name.replace(' ', '_')}.pt")
        for name, some in held_out.items()
    }
    model = start_from(trainee).to(DEVICE, torch.bfloat16)
    model.requires_grad_(False)
    llama = model.model.language_model
    projector = model.model.multi_modal_projector
    body = [*llama.layers.parameters(), *llama.norm.parameters()]
    ends = [llama.embed_tokens.weight, model.lm_head.weight, *projector.parameters()]
    for parameter in [*body, *ends]:
        parameter.requires_grad_(True)
    masters = [Master(body, 0.02), Master(ends, 0.0)]
    checkpoint = folder / "language.pt"
    used, step = 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=DEVICE)
        model.load_state_dict(state["weights"])
        used, step = state["seconds"], state["step"]
        for master, saved in zip(masters, state["masters"], strict=True):
            master.load_state_dict(saved)
    rng = np.random.default_rng(step)
    draw = random.Random(step)
    began = time.time() - used
    saved_at = shown = time.time()
    watched_at = used
    order: list[int] = []
    counts: dict[str, list[int]] = {}
    average = {"loss": 0.0, "grounding": 0.0}
    total = 60 * sum(phase.minutes for phase in phases)

    def save(seconds: float) -> None:
        state = {
            "weights": model.state_dict(),
            "masters": [master.state_dict() for master in masters],
            "seconds": seconds,
            "step": step,
        }
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").replace(checkpoint)

    while (elapsed := time.time() - began) < total:
        passed = elapsed
        for phase in phases:
            if passed < 60 * phase.minutes:
                break
            passed -= 60 * phase.minutes
        progress = passed / (60 * phase.minutes)
        if len(order) < phase.pictures:
            order = rng.permutation(len(scenes)).tolist()
        chosen = sorted(order.pop() for _ in range(phase.pictures))
        labels = scenes.labels[chosen]
        objects = [scenes.objects[index] for index in chosen]
        batch = collate([questions.for_training(things, draw) for things in objects], labels[:, 1])
        kept = choose(labels, phase.tokens, rng).to(DEVICE)
        seen = cached[torch.tensor(chosen)].to(DEVICE)
        if phase.tokens < PATCHES:
            seen = seen.gather(1, kept[..., None].expand(-1, -1, VISION))
        weight = phase.grounding[0] + (phase.grounding[1] - phase.grounding[0]) * progress
        hidden, attention = forward(model, projector(seen), kept, batch, watch=weight > 0)
        loss, hits = answer(model, hidden, batch.targets)
        average["loss"] += 0.02 * (loss.item() - average["loss"])
        if weight > 0:
            ground = grounding(attention, batch, kept)
            average["grounding"] += 0.02 * (ground.item() - average["grounding"])
            loss = loss + weight * ground
        loss.backward()
        step += 1
        rate = phase.first * (phase.last / phase.first) ** progress * min(1.0, step / 60)
        masters[0].step(rate)
        masters[1].step(rate * (0.02 if phase.gentle else 0.15))
        tally(hits, batch.questions, counts)
        if time.time() - shown > 30:
            shown = time.time()
            parts = " ".join(f"{name} {100 * right / n:.1f}" for name, (right, n) in sorted(counts.items()))
            figures = " ".join(f"{key} {value:.3f}" for key, value in average.items())
            print(
                f"language step {step} {elapsed:.0f} s, {total - elapsed:.0f} s left: {figures} {parts}",
                flush=True,
            )
            counts = {}
        if time.time() - saved_at > 150:
            saved_at = time.time()
            save(elapsed)
            if elapsed - watched_at > 400:
                watched_at = elapsed
                for name, some in held_out.items():
                    print(f"  {name}: {monitor(model, watched[name], some, 48)}", flush=True)
    save(total)
    for name, some in held_out.items():
        print(
            f"language done after {step} steps; {name}: {monitor(model, watched[name], some, len(some))}",
            flush=True,
        )
    return model


@torch.no_grad()
def check(model: LlavaForConditionalGeneration, scenes: SceneSet) -> float:
    """Largest difference in logits between this module's forwards and the stock model's, fp32."""
    model = model.float().cpu().eval()
    draw = random.Random(1)
    objects = scenes.objects[:2]
    asked = [questions.for_training(things, draw) for things in objects]
    batch = collate(asked, scenes.labels[:2, 1])
    pixels = normalise(torch.from_numpy(np.array(scenes.pictures[:2])))
    positions = torch.arange(PATCHES).expand(2, -1)
    hidden = encode(network.vision_transformer(model), pixels, positions)
    ours = model.lm_head(forward(model, model.model.multi_modal_projector(hidden[:, 1:]), positions, batch)[0])
    worst = 0.0
    for row, column_questions in enumerate(asked):
        for column, question in enumerate(column_questions):
            prompt, answer_tokens = split(question)
            text = [*prompt, *answer_tokens[:-1]]
            ids = torch.tensor([[*PREFIX, *[TOKEN["<image>"]] * PATCHES, *text]])
            theirs = model(input_ids=ids, pixel_values=pixels[row : row + 1]).logits[0, -len(text) :]
            worst = max(worst, (ours[row, column, : len(text)] - theirs).abs().max().item())
    return worst
