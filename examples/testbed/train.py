"""Train the testbed model: sources, scenes, tower, feature cache, language model, export.

Run ``python examples/testbed/train.py`` from the repository root.  Every stage resumes from ``runs/testbed``;
delete that folder to begin anew.  Stages are timed by the clock, so a faster machine takes more steps.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from scenes import RUNS, UNSEEN_STYLE, Style, build
from sources import fetch_all

FOLDER = RUNS / "testbed"
MODEL = Path(__file__).resolve().parent / "model"
STAGES = ("sources", "scenes", "tower", "language", "export")


def options() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--tower-minutes", type=float, nargs=2, default=(28.0, 10.0), help="on crops, on whole pictures"
    )
    parser.add_argument(
        "--language-minutes", type=float, nargs=4, default=(4.0, 20.0, 14.0, 10.5), help="of the four phases"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=MODEL)
    return parser.parse_args()


def main() -> None:
    """Run the stages asked for."""
    args = options()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if "sources" in args.stages:
        fetch_all()
    if {"scenes", "tower", "language"}.intersection(args.stages):
        held_out = {
            "seen styles": build("monitor", 320, 4, Style(held_out=True)),
            "unseen style": build("monitor_unseen", 160, 5, Style(held_out=True, styles=(UNSEEN_STYLE,))),
        }
        dense = build("dense", 7000, 1, Style(dense=1.0))
        plain = build("plain", 9000, 2, Style())
    if {"tower", "language"}.intersection(args.stages):
        import tower

        trainee = tower.train([dense, plain], held_out, FOLDER, tuple(args.tower_minutes))
    if "language" in args.stages:
        import language
        from language import Phase

        warm, ground, widen, free = args.language_minutes
        phases = [
            Phase(warm, 160, 16, 1e-3, 1e-3, grounding=(1.0, 1.0), gentle=True),
            Phase(ground, 192, 6, 1e-3, 9e-4, grounding=(1.0, 0.2)),
            Phase(widen, 576, 6, 9e-4, 2e-4, grounding=(1.2, 0.0)),
            Phase(free, 576, 6, 2e-4, 2e-5),
        ]
        model = language.train(trainee, plain, held_out, FOLDER, phases)
        print(f"largest difference to the stock forward in fp32: {language.check(model, plain):.1e}")
    if "export" in args.stages:
        from export import export

        weights = torch.load(FOLDER / "language.pt", map_location="cpu")["weights"]
        export(weights, args.output)


if __name__ == "__main__":
    main()
