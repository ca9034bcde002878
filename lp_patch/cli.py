"""The command ``lp-patch``: each subcommand is a thin layer over one call of the library."""

import argparse
import dataclasses
import random
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from .calibrate import SEARCHED, calibrate
from .check import check
from .config import PruningConfig, make_config
from .errors import LpPatchError
from .loading import QUESTION, ask, load, skeleton
from .patch import applied, apply
from .strategies import SCORERS, TEXT_SCORERS

DTYPES = ("auto", "float32", "bfloat16", "float16")
OPTIONS = {
    "tokens": "visual tokens of an image, the average over all decoder layers",
    "ratio": "the same as a share of the image's own tokens, in place of --tokens (default: 2/9)",
    "layer": "stage 2 cuts after this many decoder layers (default: by the model's depth)",
    "stage_ratio": "tokens before that cut over tokens after it; 1: no stage 2",
    "diversity": "share of stage 1 that is chosen to be far apart",
    "scorer": "who chooses in stage 1; auto: the pruner's way with a pruner, else diversity",
    "text_scorer": "who chooses in stage 2",
    "final_wipe_layer": "no visual token at all from this many layers on (default: never)",
    "positions": "position ids of what is kept",
    "seed": "of strategies that draw",
    "rounding": "up, as in the paper, may exceed the budget by a token or two; down never does",
}
CHOICES = {
    "scorer": ("auto", *SCORERS),
    "text_scorer": tuple(TEXT_SCORERS),
    "positions": ("original", "compact"),
    "rounding": ("up", "down"),
}
EPILOG = "MODEL is a folder or a Hub id. lp-patch COMMAND --help describes each command."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 where `check` finds that the model does not fit, 2 for an error."""
    parser = argparse.ArgumentParser(prog="lp-patch", description="Visual-token pruning.", epilog=EPILOG)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_check, _add_bench, _add_calibrate, _add_show, _add_train):
        add(commands)
    given = parser.parse_args(arguments)
    try:
        return given.run(given)
    except (LpPatchError, OSError) as error:  # the latter: a file, a picture or a checkpoint that cannot be read
        print(f"lp-patch: {error}", file=sys.stderr)
        return 2


def _command(commands: Any, run: Any, text: str) -> argparse.ArgumentParser:
    """A subcommand, called like its function, that takes a model."""
    added = commands.add_parser(run.__name__.strip("_"), help=text.split(":")[0], description=text)
    added.set_defaults(run=run)
    added.add_argument("model", metavar="MODEL", help="checkpoint: a folder or a Hub id")
    return added


def _add_options(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """The options of `apply`; what is not given stays what the library has as its default."""
    kinds = get_type_hints(PruningConfig)
    group = parser.add_argument_group("pruning", "options of lp_patch.apply, see help(lp_patch.PruningConfig)")
    for field in dataclasses.fields(PruningConfig):
        if field.name in without:
            continue
        shown = OPTIONS[field.name] + ("" if field.default is None else f" (default: {field.default})")
        group.add_argument(
            _flag(field.name),
            type=_plain(kinds[field.name]),
            choices=CHOICES.get(field.name),
            default=argparse.SUPPRESS,
            help=shown,
        )
    group.add_argument("--pruner", default=argparse.SUPPRESS, help="trained stage-1 weights: a folder or a Hub id")
    if "config" not in without:
        group.add_argument(
            "--settings",
            dest="config",
            metavar="FOLDER",
            type=_folder,
            default=argparse.SUPPRESS,
            help="what lp-patch calibrate or Patch.save_pretrained wrote; options override it",
        )


def _options(given: argparse.Namespace) -> dict[str, Any]:
    """What `apply` is called with; checked here, before a model is loaded."""
    names = {field.name for field in dataclasses.fields(PruningConfig)}
    options = {name: getattr(given, name) for name in (*names, "pruner", "config", "compile") if hasattr(given, name)}
    base = PruningConfig.load(options["config"]) if "config" in options else None
    make_config(base, {name: x for name, x in options.items() if name in names})
    return options


def _add_check(commands: Any) -> None:
    added = _command(
        commands,
        _check,
        "does a model fit, and where would it be cut: tried on a tiny twin of its config, no weights are loaded. Exit "
        "status 1 if it does not fit.",
    )
    added.add_argument(
        "--visual-tokens", type=_count, default=576, help="how many an image has, to say what is left (%(default)s)"
    )
    _add_options(added)


def _check(given: argparse.Namespace) -> int:
    options, model = _options(given), skeleton(given.model)
    found = check(model)
    print(found)
    if not found.ok:
        return 1
    patch = apply(model, **options)
    budget, n_layers, layer = patch.budget(given.visual_tokens), *patch.cuts
    print(
        f"\n{patch}\nof {given.visual_tokens} visual tokens: {budget.stage1} in decoder layers 1 to {layer}, "
        f"{budget.stage2} in {layer + 1} to {n_layers}"
    )
    return 0


def _add_bench(commands: Any) -> None:
    added = _command(
        commands,
        _bench,
        "what pruning gains here: stock, patched, and a smaller picture of as many tokens, in turn on this machine.",
    )
    added.add_argument("--image", type=Path, help="the picture (default: noise of 672 x 504 pixels)")
    added.add_argument("--question", default=QUESTION, help="(%(default)s)")
    added.add_argument("--runs", type=_count, default=5, help="turns that count (%(default)s)")
    added.add_argument("--new-tokens", type=_count, default=16, help="of each answer (%(default)s)")
    added.add_argument("--csv", type=Path, help="write the table to this file")
    added.add_argument(
        "--compile",
        action="store_true",
        default=argparse.SUPPRESS,
        help="apply(model, compile=True), for one picture on a GPU",
    )
    _add_machine(added)
    _add_options(added)


def _bench(given: argparse.Namespace) -> int:
    from .bench import bench

    options = _options(given)
    picture = _noise() if given.image is None else _open(given.image)
    if given.csv is not None:
        given.csv.parent.mkdir(parents=True, exist_ok=True)
    model, processor = load(given.model, given.device, given.dtype)
    measured = bench(
        model,
        processor,
        picture,
        given.question,
        runs=given.runs,
        new_tokens=given.new_tokens,
        options=options,
    )
    print(measured)
    if given.csv is not None:
        measured.save(given.csv)
        print(f"wrote {given.csv}")
    return 0


def _add_calibrate(commands: Any) -> None:
    added = _command(
        commands,
        _calibrate,
        "find layer and stage_ratio for this model and budget, without labels: the folder it writes is what "
        "apply(model, FOLDER) takes.",
    )
    added.add_argument(
        "data", type=Path, metavar="DATA", help="JSON file in LLaVA's conversation format, of your kinds"
    )
    added.add_argument("--images", type=Path, help="folder of the pictures (default: the file's)")
    added.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for the settings")
    added.add_argument(
        "--prompts", type=_count, default=96, help="so many of its samples, drawn at random (%(default)s)"
    )
    added.add_argument("--batch", type=_count, default=8, help="prompts at a time (%(default)s)")
    added.add_argument("--answer-tokens", type=_count, default=32, help="of each answer, at most (%(default)s)")
    added.add_argument("--plot", type=_picture, metavar="OUT.png", help="draw the settings tried")
    _add_machine(added)
    _add_options(added, without=(*SEARCHED, "config"))


def _calibrate(given: argparse.Namespace) -> int:
    from .training.data import ConversationDataset, prompts

    options, data = _options(given), ConversationDataset(given.data, given.images)
    for folder in (given.output, *([given.plot.parent] if given.plot else [])):
        folder.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(0).sample(range(len(data)), min(given.prompts, len(data)))
    model, processor = load(given.model, given.device, given.dtype)
    asked = prompts(processor, (data[index] for index in drawn), given.batch)
    asked = (x.to(model.device, model.dtype) for x in asked)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lp_patch.calibrate: ")  # what is printed says it too
        found = calibrate(model, asked, answer_tokens=given.answer_tokens, **options)
    print(found)
    found.save(given.output)
    print(f"wrote {given.output}")
    if given.plot is not None:
        found.plot(given.plot)
        print(f"wrote {given.plot}")
    return 0


def _add_show(commands: Any) -> None:
    added = _command(commands, _show, "draw what was kept of a picture for a question: Patch.show.")
    added.add_argument("picture", type=Path, metavar="PICTURE")
    added.add_argument("question", metavar="QUESTION")
    added.add_argument("output", type=_picture, metavar="OUT.png")
    added.add_argument("--new-tokens", type=_count, default=64, help="of the answer, at most (%(default)s)")
    _add_machine(added)
    _add_options(added)


def _show(given: argparse.Namespace) -> int:
    options, picture = _options(given), _open(given.picture)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    model, processor = load(given.model, given.device, given.dtype)
    inputs = ask(processor, picture, given.question).to(model.device, model.dtype)
    with applied(model, **options) as patch:
        output = model.generate(**inputs, max_new_tokens=given.new_tokens, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        patch.show(picture, processor=processor, title=f"{given.question}  {answer}", path=given.output)
        print(f"{answer}\n\n{patch.report()}\nwrote {given.output}")
    return 0


def _add_train(commands: Any) -> None:
    from .training.run import TrainingRun

    added = _command(
        commands,
        _train,
        "train a pruner on conversations in LLaVA's format: the folder it writes is what apply(model, pruner=...) "
        'takes. Needs the extra "train". Interrupted, the same command goes on from its last checkpoint.',
    )
    added.add_argument("data", type=Path, metavar="DATA", help="JSON file in LLaVA's conversation format")
    added.add_argument("--output", type=Path, required=True, help="folder for the pruner; checkpoints go below it")
    kinds = get_type_hints(TrainingRun)
    for field in dataclasses.fields(TrainingRun):
        if field.name in ("model", "data", "output"):
            continue
        kind, text = kinds[field.name], field.metadata["help"]
        if kind is bool:
            added.add_argument(_flag(field.name), action="store_true", help=text)
        elif get_origin(kind) is Literal:
            shown = f"{text} ({field.default})"
            added.add_argument(_flag(field.name), choices=get_args(kind), default=field.default, help=shown)
        else:
            shown = text if field.default is None else f"{text} ({field.default})"
            kind = _count if field.name in ("batch", "accumulate", "save_steps") else _plain(kind)
            added.add_argument(_flag(field.name), type=kind, default=field.default, help=shown)


def _train(given: argparse.Namespace) -> int:
    from .training.run import TrainingRun, train

    train(TrainingRun(**{field.name: getattr(given, field.name) for field in dataclasses.fields(TrainingRun)}))
    return 0


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_device, help="as torch names it (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)")


def _count(text: str) -> int:
    """A number of things, at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _device(text: str) -> str:
    """A device that is here."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # torch has its own for each backend that it lacks
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {str(error).splitlines()[0]}") from None
    return text


def _folder(text: str) -> Path:
    """A folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, got {text!r}")
    return Path(text)


def _picture(text: str) -> Path:
    """A picture to write."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    return path


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _plain(kind: Any) -> Any:
    """The type of an optional one."""
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = [x for x in get_args(kind) if x is not type(None)]
    return kind


def _open(path: Path) -> Any:
    from .show import need

    need("PIL")
    from PIL import Image

    return Image.open(path).convert("RGB")


def _noise() -> Any:
    import numpy as np

    from .show import need

    need("PIL")
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (504, 672, 3), dtype=np.uint8))
