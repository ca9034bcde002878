"""``python -m lp_patch.vllm MODEL --tokens 64`` prints what goes after ``--hf-overrides``."""

import argparse
import json

from .options import overrides


def main() -> None:
    """Read the options and print the overrides as JSON."""
    parser = argparse.ArgumentParser(prog="python -m lp_patch.vllm", description=__doc__)
    parser.add_argument("model", help="a local checkpoint's folder, or a Hub id")
    parser.add_argument("--tokens", type=int, help="visual tokens that a picture brings into the language model")
    parser.add_argument("--ratio", type=float, help="the same as a share of its own tokens; give one of the two")
    parser.add_argument("--scorer", help="stage 1 strategy")
    parser.add_argument("--diversity", type=float, help="share chosen by farthest points")
    parser.add_argument("--positions", choices=["original", "compact"])
    parser.add_argument("--pruner", help="folder or Hub id of trained weights")
    parser.add_argument("--seed", type=int, help="for strategies that draw")
    parser.add_argument("--rounding", choices=["up", "down"], help="of a share of tokens")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    print(json.dumps(overrides(given.pop("model"), **given)))


main()
