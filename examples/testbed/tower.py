"""Stage 1: train the CLIP tower and the projector on dense labels.

Every patch feature of layer -2 goes through the projector and is compared with word vectors, the later input
embeddings of the language model: so the projector starts aligned.  [CLS] learns which kinds are present.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import network
import numpy as np
import torch
import torch.nn.functional as F
from network import (
    DEVICE,
    GRID,
    PATCH,
    PATCHES,
    TEXT,
    VISION,
    Master,
    cosine,
    encode,
    last_layer_cls,
    normalise,
)
from scenes import IGNORE, SceneSet, areas
from torch import Tensor, nn
from vocabulary import COLOURS, KINDS, words

SHARPNESS = 8.0
EDGE = 150
"""Area, in patches, that patches outside of objects are taught to report: hardly any weight when counting."""
TOKEN = {word: index for index, word in enumerate(words())}
KIND_TOKENS = [TOKEN[kind] for kind in KINDS]
COLOUR_TOKENS = [TOKEN[colour] for colour in COLOURS]


class Trainee(nn.Module):
    """The tower, the projector and the training-only heads."""

    def __init__(self) -> None:
        super().__init__()
        model = network.build()
        self.vision = network.vision_transformer(model)
        self.projector = model.model.multi_modal_projector
        self.words = nn.Parameter(torch.randn(len(TOKEN), TEXT) / TEXT**0.5)
        self.background = nn.Parameter(torch.randn(TEXT) / TEXT**0.5)
        self.size = nn.Parameter(torch.randn(TEXT) / TEXT**0.5)
        self.present = nn.Linear(VISION, len(KINDS))
        self.present_last = nn.Linear(VISION, len(KINDS))
        nn.init.constant_(self.present.bias, -3.0)
        nn.init.constant_(self.present_last.bias, -3.0)

    def whiten(self, pictures: np.ndarray) -> None:
        """Start from a whitening patch embedding and sine-cosine positions."""
        rng = np.random.default_rng(0)
        chosen = torch.from_numpy(pictures[np.sort(rng.choice(len(pictures), 300, replace=False))])
        pixels = normalise(chosen).view(-1, 3, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 1, 3, 5)
        patches = pixels.reshape(-1, 3 * PATCH * PATCH)[::7]
        patches = patches - patches.mean(0)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        kernel = (vectors[:, -VISION:] / (values[-VISION:] + 3e-3).sqrt()).T.flip(0)
        steps = 40.0 ** -(torch.arange(VISION // 4) / (VISION // 4))
        down, across = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
        waves = [wave(axis.reshape(-1, 1) * steps) for axis in (across, down) for wave in (torch.sin, torch.cos)]
        with torch.no_grad():
            self.vision.embeddings.patch_embedding.weight.copy_(kernel.view(VISION, 3, PATCH, PATCH))
            self.vision.embeddings.position_embedding.weight[1:].copy_(torch.cat(waves, 1) * 0.7)


def colour_labels(objects: list[dict], instances: np.ndarray) -> np.ndarray:
    """Colour index on the patches of signs, -100 elsewhere."""
    colours = np.full(instances.shape, -100, np.int64)
    for index, thing in enumerate(objects):
        if "colour" in thing:
            colours[instances == index + 1] = list(COLOURS).index(thing["colour"])
    return colours


class Crops:
    """Random crops of a scene set; small ones are the best of four by foreground."""

    def __init__(self, sets: list[SceneSet], seed: int) -> None:
        self.sets = sets
        self.rng = np.random.default_rng(seed)

    def batch(self, count: int, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures, labels (B, 4, side * side), colours and grid positions."""
        pictures, labels, colours, positions = [], [], [], []
        for _ in range(count):
            best = None
            for _ in range(4 if side < GRID else 1):
                scenes = self.sets[self.rng.integers(len(self.sets))]
                index = int(self.rng.integers(len(scenes)))
                row, column = self.rng.integers(0, GRID - side + 1, 2)
                window = scenes.labels[index].reshape(4, GRID, GRID)[:, row : row + side, column : column + side]
                score = int((window[0] > 0).sum())
                if best is None or score > best[0]:
                    best = (score, scenes, index, row, column, window)
            _, scenes, index, row, column, window = best
            rows = slice(row * PATCH, (row + side) * PATCH)
            columns = slice(column * PATCH, (column + side) * PATCH)
            pictures.append(scenes.pictures[index, rows, columns])
            window = np.stack([*window[:3], areas(window[1])])
            labels.append(window.reshape(4, -1))
            colours.append(colour_labels(scenes.objects[index], window[1].reshape(-1)))
            grid = (row + np.arange(side))[:, None] * GRID + column + np.arange(side)
            positions.append(grid.reshape(-1))
        stacks = [torch.from_numpy(np.stack(part)) for part in (pictures, labels, colours, positions)]
        return tuple(stack.to(DEVICE) for stack in stacks)


def losses(
    trainee: Trainee, hidden: Tensor, labels: Tensor, colours: Tensor, positions: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The dense losses on layer -2 and the [CLS] loss, with figures to watch."""
    projected = trainee.projector(hidden[:, 1:])
    classes = torch.cat([trainee.background[None], trainee.words[KIND_TOKENS]])
    logits = SHARPNESS * (projected @ classes.T).float()
    target = labels[:, 0].long()
    foreground = (target > 0) & (target < IGNORE)
    background = target == 0
    entropy = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="none")
    weight = foreground.float() + 0.25 * background.float()
    loss_class = (entropy * weight.flatten()).sum() / weight.sum()
    size = 2.4 + 4 * (projected @ trainee.size).float()
    area = torch.where(foreground, labels[:, 3].float().clamp(min=1), float(EDGE))
    weight = foreground.float() + 0.5 * (target == IGNORE).float() + 0.05 * background.float()
    off = (size - area.log()) ** 2
    loss_size = (off * weight).sum() / weight.sum()
    tint = SHARPNESS * (projected @ trainee.words[COLOUR_TOKENS].T).float()
    loss_colour = F.cross_entropy(tint.flatten(0, 1), colours.flatten(), ignore_index=-100, reduction="sum")
    loss_colour = loss_colour / (colours >= 0).sum().clamp(min=1)
    axes = [
        trainee.words[TOKEN["right"]] - trainee.words[TOKEN["left"]],
        trainee.words[TOKEN["bottom"]] - trainee.words[TOKEN["top"]],
    ]
    place = 2.0 * (projected @ torch.stack(axes).T).float()
    truth = torch.stack([positions % GRID, positions // GRID], -1).float() / (GRID - 1) * 2 - 1
    errors = ((place - truth) ** 2).mean(-1)
    loss_place = (errors * (0.1 + foreground.float())).mean()
    present = F.one_hot(target * foreground, len(KINDS) + 1).amax(1)[:, 1:].float()
    boost = torch.tensor(4.0, device=hidden.device)
    loss_present = F.binary_cross_entropy_with_logits(trainee.present(hidden[:, 0]).float(), present, pos_weight=boost)
    total = loss_class + 0.8 * loss_size + 0.2 * loss_colour + 0.7 * loss_place + loss_present
    with torch.no_grad():
        right = logits.argmax(-1) == target
        figures = {
            "class": loss_class.item(),
            "size": off[foreground].mean().item(),
            "edge": off[target == IGNORE].mean().item(),
            "colour": loss_colour.item(),
            "place": errors[foreground].mean().item(),
            "present": loss_present.item(),
            "foreground": right[foreground].float().mean().item(),
            "background": right[background].float().mean().item(),
        }
    return total, figures


@torch.no_grad()
def monitor(trainee: Trainee, scenes: SceneSet, count: int = 160) -> dict[str, float]:
    """The figures on held-out scenes."""
    sums: dict[str, float] = {}
    positions = torch.arange(PATCHES, device=DEVICE).expand(16, -1)
    for start in range(0, count, 16):
        pictures = torch.from_numpy(np.array(scenes.pictures[start : start + 16])).to(DEVICE)
        labels = torch.from_numpy(scenes.labels[start : start + 16]).to(DEVICE)
        colours = [colour_labels(scenes.objects[i], scenes.labels[i, 1]) for i in range(start, start + 16)]
        hidden = encode(trainee.vision, normalise(pictures), positions)
        _, figures = losses(trainee, hidden, labels, torch.from_numpy(np.stack(colours)).to(DEVICE), positions)
        for key, value in figures.items():
            sums[key] = sums.get(key, 0.0) + value * 16 / count
    return {key: round(value, 3) for key, value in sums.items()}


def train(sets: list[SceneSet], held_out: dict[str, SceneSet], folder: Path, minutes: tuple[float, float]) -> Trainee:
    """Train on 168-px crops, then on whole pictures; resumes from the last checkpoint."""
    checkpoint = folder / "tower.pt"
    trainee = Trainee()
    trainee.whiten(sets[0].pictures)
    trainee.to(DEVICE, torch.bfloat16)
    used, step, state = 0.0, 0, None
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=DEVICE)
        trainee.load_state_dict(state["weights"])
        used, step = state["seconds"], state["step"]
    total = 60 * sum(minutes)
    if used >= total:
        return trainee
    master = Master(list(trainee.parameters()), decay=0.05)
    if state:
        master.load_state_dict(state["master"])
    crops = Crops(sets, seed=step)
    began = time.time() - used
    saved = shown = time.time()
    average: dict[str, float] = {}
    while (elapsed := time.time() - began) < total:
        side, count = (12, 16) if elapsed < 60 * minutes[0] else (GRID, 5)
        pictures, labels, colours, positions = crops.batch(count, side)
        hidden = encode(trainee.vision, normalise(pictures), positions)
        loss, figures = losses(trainee, hidden, labels, colours, positions)
        if step % 4 == 0:
            present = F.one_hot(labels[:, 0].long() * (labels[:, 0] < IGNORE), len(KINDS) + 1).amax(1)[:, 1:].float()
            final = trainee.present_last(last_layer_cls(trainee.vision, hidden.detach())).float()
            loss = loss + F.binary_cross_entropy_with_logits(final, present)
        loss.backward()
        master.step(cosine(elapsed / total, 1.3e-3) * min(1.0, (step + 1) / 60))
        step += 1
        for key, value in figures.items():
            if not math.isnan(value):
                average[key] = 0.98 * average.get(key, value) + 0.02 * value
        if time.time() - shown > 30:
            shown = time.time()
            text = " ".join(f"{key} {value:.3f}" for key, value in average.items())
            print(f"tower step {step} {elapsed:.0f} s, {total - elapsed:.0f} s left: {text}", flush=True)
        if time.time() - saved > 150:
            saved = time.time()
            save(checkpoint, trainee, master, elapsed, step)
            for name, scenes in held_out.items():
                print(f"  {name}: {monitor(trainee, scenes, 80)}", flush=True)
    save(checkpoint, trainee, master, total, step)
    for name, scenes in held_out.items():
        print(f"tower done after {step} steps; {name}: {monitor(trainee, scenes)}", flush=True)
    return trainee


def save(path: Path, trainee: Trainee, master: Master, seconds: float, step: int) -> None:
    """Write a checkpoint in one piece."""
    partial = path.with_suffix(".partial")
    state = {"weights": trainee.state_dict(), "master": master.state_dict(), "seconds": seconds, "step": step}
    torch.save(state, partial)
    partial.replace(path)
