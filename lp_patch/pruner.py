"""Trained weights of stage 1: their files on disk and on the Hub, and LearnablePruner, the per-token module."""

import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import HfApi, ModelCardData, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import ConfigError, PrunerError
from .recommend import check_recommended

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
# still 1: the facts below are optional, so files without them load here, and files with them in an older lp_patch
FORMAT_VERSION = 1
FACTS = ("base_model", "model_type", "license", "training_info", "recommended")
CARD_MARK = "<!-- lp_patch writes this card anew at each save. Delete this line, and it keeps what you wrote. -->"

CHECKPOINT_FOLDER = "lp_patch_pruner"  # inside a local checkpoint's folder: the pruner that belongs to it
# base checkpoint on the Hub -> the Hub id of its pruner, as "org/base": "org/pruner"; only weights that exist
KNOWN_PRUNERS: dict[str, str] = {}

Own = TypeVar("Own", bound="Pruner")


class Pruner(nn.Module):
    """Trained weights that a stage-1 strategy reads, with what is known of them. A subclass is one kind.

    Args:
        sizes: by name, each an attribute too; "hidden_size" is the width of the features that it reads.
        base_model: checkpoint that it was trained on, as its ``from_pretrained`` takes it; None: unknown.
        model_type: that checkpoint's ``config.model_type``; None: unknown.
        license: of the weights, an identifier of the Hub's; None: unknown.
        training_info: how it was trained and what it reached, for the model card: "objective", "data", "samples",
            "seed", "figures" (a dict) and whatever else JSON holds.
        recommended: settings that `lp_patch.calibrate` found best with it, a dict for each strategy and budget
            (`lp_patch.recommend`); `apply` takes them where the caller says nothing else.

    The last five are attributes too, and are checked again when it is saved.

    Attributes:
        kind: the name of the strategy that "auto" means with such weights; ``config.json`` says it.
        sizes: names of the constructor's own arguments, which ``config.json`` holds.
        about: what its model card says of it, with the sizes to be filled in.

    Raises:
        PrunerError: an argument is out of range or of another type.
    """

    kind: ClassVar[str]
    sizes: ClassVar[tuple[str, ...]]
    about: ClassVar[str]
    kinds: ClassVar[dict[str, type["Pruner"]]] = {}
    hidden_size: int

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Pruner.kinds.setdefault(cls.kind, cls)

    def __init__(
        self,
        sizes: dict[str, int],
        *,
        base_model: str | None = None,
        model_type: str | None = None,
        license: str | None = "apache-2.0",
        training_info: dict[str, Any] | None = None,
        recommended: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PrunerError(f"{name} must be an int >= 1, got {value!r}")
            setattr(self, name, value)
        self.base_model = base_model
        self.model_type = model_type
        self.license = license
        self.training_info = {} if training_info is None else training_info  # `training` is nn.Module's own
        self.recommended = [] if recommended is None else recommended
        self._config()

    def follow(self, x: Tensor) -> None:
        """Go to x's device, once, and stay there: features are more than weights."""
        if next(self.parameters()).device != x.device:
            self.to(x.device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json``, ``model.safetensors`` and a model card, ``README.md``, into `folder`, made if missing.

        A ``README.md`` that is there already is replaced only if it holds the card's own first comment: delete that
        line, and your text stays.

        Raises:
            PrunerError: an attribute that goes into the files was set to what they cannot hold.
        """
        self._save(Path(folder), Path(folder).as_posix())

    def _save(self, folder: Path, source: str) -> None:
        config = json.dumps(self._config(), indent=2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        card = folder / CARD_FILE
        if not card.exists() or CARD_MARK in card.read_text(encoding="utf-8", errors="replace"):
            card.write_text(_card(self, source), encoding="utf-8")

    def _config(self) -> dict[str, Any]:
        """The content of ``config.json``, checked."""
        for name in ("base_model", "model_type", "license"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise PrunerError(f"{name} must be a name, or None if it is unknown, got {value!r:.200}")
        try:
            json.dumps(self.training_info, allow_nan=False)
            if not isinstance(self.training_info, dict):
                raise TypeError("no dict")
        except (TypeError, ValueError, RecursionError) as error:
            raise PrunerError(
                f"training_info must be a dict of what JSON holds ({error}), got {self.training_info!r:.200}"
            ) from error
        try:
            check_recommended(self.recommended)
        except ConfigError as error:
            raise PrunerError(f"recommended settings: {error}") from error
        # files of the first kind do not name it: those before there were others do not either
        kind = {} if self.kind == LearnablePruner.kind else {"kind": self.kind}
        facts = [name for name in FACTS if name != "recommended" or self.recommended]
        held = {name: getattr(self, name) for name in (*self.sizes, *facts)}
        return {"format_version": FORMAT_VERSION, **kind, **held}

    @classmethod
    def from_pretrained(
        cls: type[Own], source: str | Path, *, revision: str | None = None, width: int | None = None, **hub_options: Any
    ) -> Own:
        """Load from a folder or a Hub repository; never unpickles and never runs code from there.

        `Pruner` loads any kind, a subclass its own.

        Args:
            source: an existing folder, else a Hub id ("org/name").
            revision: branch, tag or commit of the Hub repository.
            width: features that it must read; another width is refused before the weights are downloaded. None: any.
            hub_options: passed to `huggingface_hub.hf_hub_download` (token, cache_dir, local_files_only, ...).

        Raises:
            PrunerError: a file is missing or damaged, the two do not belong together, or the width is another.
        """
        config_path = _locate(source, CONFIG_FILE, revision, hub_options)
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
            version = config.get("format_version")
            kind = config.get("kind", LearnablePruner.kind)
            sizes = {name: config[name] for name in getattr(Pruner.kinds.get(kind), "sizes", ())}
            facts = {name: config.get(name) for name in FACTS}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PrunerError(f"{CONFIG_FILE} of {str(source)!r} is not a pruner's: {error!r}") from error
        if version != FORMAT_VERSION:
            raise PrunerError(f"{str(source)!r} has format_version {version!r}; this lp_patch reads {FORMAT_VERSION}")
        if kind not in Pruner.kinds:
            raise PrunerError(f"{str(source)!r} is of kind {kind!r}; this lp_patch reads {', '.join(Pruner.kinds)}")
        own = Pruner.kinds[kind]
        if not issubclass(own, cls):
            raise PrunerError(
                f"{str(source)!r} holds weights of kind {kind!r}, {own.__name__}, asked for was {cls.__name__}: load "
                "them with lp_patch.pruner.Pruner.from_pretrained"
            )
        try:
            with torch.device("meta"):
                pruner = own(**sizes, **facts)
        except (PrunerError, RuntimeError, TypeError) as error:  # the last two: more numbers than torch can address
            raise PrunerError(f"{CONFIG_FILE} of {str(source)!r}: {str(error).splitlines()[0]}") from error
        if width is not None:
            _check_width(pruner, width)
        weights_path = _locate(source, WEIGHTS_FILE, revision, hub_options)
        try:
            weights = load_file(weights_path)
        except (OSError, SafetensorError) as error:
            raise PrunerError(f"{WEIGHTS_FILE} of {str(source)!r} cannot be read: {error}") from error
        expected = {name: tuple(tensor.shape) for name, tensor in pruner.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if found != expected:
            raise PrunerError(f"{WEIGHTS_FILE} of {str(source)!r} holds {found}, but {CONFIG_FILE} asks for {expected}")
        if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in weights.values()):
            raise PrunerError(f"{WEIGHTS_FILE} of {str(source)!r} must hold finite floating-point numbers")
        pruner.load_state_dict(weights, assign=True)
        return pruner.eval()

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the three files to a Hub model repository, made if missing; returns the commit's address.

        A card that the repository holds is replaced; its history keeps it.
        """
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self._save(Path(folder), repo_id)
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"Upload {type(self).__name__} with lp_patch"
            ).commit_url


class LearnablePruner(Pruner):
    """A per-token MLP that says how much a visual token is worth keeping (LearnPruner, section 3).

    ``Linear(hidden, intermediate) -> GELU -> Linear(intermediate, 2)``; the paper gives the parameter count
    (0.53 M at 1024), the activation and the meaning of the outputs are ours: index 0 drops, index 1 keeps.

    Args:
        hidden_size: width of the features that it reads, the projector's input.
        intermediate_size: width of the hidden layer.
        facts: what is known of the weights: base_model, model_type, license, training_info; see `Pruner`.

    Raises:
        PrunerError: an argument is out of range or of another type.
    """

    kind = "learned"
    sizes = ("hidden_size", "intermediate_size")
    intermediate_size: int
    about = (
        "(LearnPruner, arXiv 2604.23950): it scores each visual token by its\n{hidden_size}-wide feature, so that a "
        "vision-language model may keep the best of them."
    )

    def __init__(self, hidden_size: int, intermediate_size: int = 512, **facts: Any) -> None:
        super().__init__({"hidden_size": hidden_size, "intermediate_size": intermediate_size}, **facts)
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(intermediate_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (drop, keep): x (..., hidden) in the module's dtype -> (..., 2)."""
        return self.fc2(self.act(self.fc1(x)))

    def score(self, x: Tensor) -> Tensor:
        """Keep probability in float32: x (..., hidden), any float dtype and device -> (...)."""
        self.follow(x)
        with torch.autocast(x.device.type, enabled=False):
            return self(x.to(self.fc1.weight.dtype)).float().softmax(dim=-1)[..., 1]


def _card(pruner: Pruner, source: str) -> str:
    """The model card of a pruner that is applied from `source`; what is unknown is said to be."""
    base = pruner.base_model
    # the Hub refuses a base_model that cannot be a Hub id, such as a folder's path
    linked = base if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base or "", re.ASCII) else None
    data = ModelCardData(
        library_name="lp_patch", license=pruner.license, base_model=linked, tags=["lp_patch", "visual-token-pruning"]
    )
    info = {**dict.fromkeys(("objective", "data", "samples", "seed")), **pruner.training_info}
    figures = info.pop("figures", None)
    results = _table(figures) if isinstance(figures, dict) and figures else _cell(figures or None)
    facts = {"base model": base, "model type": pruner.model_type, "license": pruner.license, **info}
    return f"""---
{data.to_yaml()}
---
{CARD_MARK}

# Visual-token pruner

A `{type(pruner).__name__}` of lp_patch {pruner.about.format_map(vars(pruner))}

```python
import lp_patch

patch = lp_patch.apply(model, pruner={json.dumps(source)})  # model: the base model, loaded with transformers
```

## Training

{_table(facts)}

## Figures

{results}
{_recommended(pruner)}"""


def _recommended(pruner: Pruner) -> str:
    """The card's section on recommended settings; empty without any."""
    if not pruner.recommended:
        return ""
    names = list(dict.fromkeys(name for entry in pruner.recommended for name in entry))
    rows = [[_cell(entry[name]) if name in entry else "" for name in names] for entry in pruner.recommended]
    lines = [names, ["---"] * len(names), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""
## Recommended settings

`lp_patch.calibrate` found these best on so many prompts, which `lp_patch.apply(model, tokens=...)` takes unless told
otherwise.

{table}
"""


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())])


def _cell(value: object) -> str:
    """One line of Markdown that may stand in a table."""
    text = "unknown" if value is None else value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split()).replace("|", "\\|")


def _locate(source: str | Path, name: str, revision: str | None, hub_options: dict[str, Any]) -> Path:
    """Local path of one file of `source`, downloaded if it is a Hub id."""
    if Path(source).is_dir():
        path = Path(source) / name
        if not path.is_file():
            raise PrunerError(f"no {name} in the folder {str(source)!r}; a pruner is {CONFIG_FILE} and {WEIGHTS_FILE}")
        return path
    try:
        return Path(hf_hub_download(str(source), name, revision=revision, **hub_options))
    except TypeError:  # an option that hf_hub_download does not have
        raise
    except Exception as error:  # the client lets errors of its HTTP library through, and changes that library
        raise PrunerError(
            f"no pruner at {str(source)!r}: it is no folder here, and the Hub answered {type(error).__name__}: {error}"
        ) from error


def _check_width(pruner: Pruner, width: int) -> None:
    if pruner.hidden_size != width:
        raise PrunerError(
            f"the pruner reads {pruner.hidden_size}-wide features, this model has {width}-wide ones: "
            "use a pruner that was trained on this model"
        )


def resolve_pruner(pruner: object, width: int, config: Any = None) -> Pruner | None:
    """The `pruner=` of `apply` as a module of the model's width, or None; warns of one trained on another base.

    Args:
        pruner: None, a Pruner, a folder, or a Hub id.
        width: features that the model's projector reads.
        config: the model's, whose checkpoint and type are compared with the pruner's; None: they are not. A model that
            was not loaded from anywhere has no checkpoint to compare.

    Raises:
        PrunerError: it cannot be loaded, is something else, or reads another width.
    """
    if pruner is None:
        return None
    if isinstance(pruner, (str, Path)):
        pruner = Pruner.from_pretrained(pruner, width=width)
    if not isinstance(pruner, Pruner):
        raise PrunerError(
            f"pruner must be a LearnablePruner, a folder or a Hub id, got {type(pruner).__name__}: {pruner!r}"
        )
    _check_width(pruner, width)
    if config is not None:
        base, name = pruner.base_model, _name(config)
        if (base and name and not _same_checkpoint(base, name)) or pruner.model_type not in (None, config.model_type):
            warnings.warn(
                f"the pruner was trained on {base!r:.200} (model type {pruner.model_type!r:.200}), this model is "
                f"{name!r} ({config.model_type!r}): how well it chooses tokens here is unknown",
                stacklevel=3,
            )
    return pruner


def find_pruner(config: Any, width: int) -> Pruner | None:
    """The pruner that belongs to a checkpoint: the one inside its local folder, else that of `KNOWN_PRUNERS`, or None.

    Only an entry of the table may ask the Hub. Where it lies says what it is for: no base is compared.

    Args:
        config: the model's; its name is what ``from_pretrained`` was given. None belongs to a model without a name.
        width: features that the model's projector reads.

    Raises:
        PrunerError: there is one and it cannot be loaded, or it reads another width.
    """
    name, source = _name(config), pruner_source(config)
    if source is None:
        return None
    try:
        return Pruner.from_pretrained(source, width=width)
    except PrunerError as error:
        raise PrunerError(f'the pruner of {name!r} (scorer="diversity" prunes without it): {error}') from error


def pruner_source(config: Any) -> Path | str | None:
    """Where the pruner of a checkpoint lies, as `find_pruner` looks for it: a folder, a Hub id, or None."""
    name = _name(config)
    inside = Path(name) / CHECKPOINT_FOLDER
    return inside if name and inside.is_dir() else KNOWN_PRUNERS.get(name)


def _name(config: Any) -> str:
    """What `from_pretrained` was given, as transformers notes it; empty for a model built from a config."""
    return getattr(config, "_name_or_path", None) or ""


def _same_checkpoint(base: str, name: str) -> bool:
    """Whether a model loaded from `name` may be `base`: also a folder of the same last name, and a Hub cache's."""
    path = Path(os.path.abspath(name))
    return Path(base).name == path.name or f"models--{base.replace('/', '--')}" in path.parts
