"""LearnablePruner: the per-token module of stage 1, and its files on disk and on the Hub."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import PrunerError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1


class LearnablePruner(nn.Module):
    """A per-token MLP that says how much a visual token is worth keeping (LearnPruner, section 3).

    ``Linear(hidden, intermediate) -> GELU -> Linear(intermediate, 2)``; the paper gives the parameter count
    (0.53 M at 1024), the activation and the meaning of the outputs are ours: index 0 drops, index 1 keeps.

    Args:
        hidden_size: width of the features that it reads, the projector's input.
        intermediate_size: width of the hidden layer.
    """

    def __init__(self, hidden_size: int, intermediate_size: int = 512) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PrunerError(f"{name} must be an int >= 1, got {value!r}")
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(intermediate_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (drop, keep): x (..., hidden) in the module's dtype -> (..., 2)."""
        return self.fc2(self.act(self.fc1(x)))

    def score(self, x: Tensor) -> Tensor:
        """Keep probability in float32: x (..., hidden), any float dtype and device -> (...)."""
        weight = self.fc1.weight
        return self(x.to(weight.device, weight.dtype)).float().softmax(dim=-1)[..., 1].to(x.device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into `folder`, which is made if missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format_version": FORMAT_VERSION,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, **hub_options: Any
    ) -> "LearnablePruner":
        """Load from a folder or a Hub repository; never unpickles and never runs code from there.

        Args:
            source: an existing folder, else a Hub id ("org/name").
            revision: branch, tag or commit of the Hub repository.
            hub_options: passed to `huggingface_hub.hf_hub_download` (token, cache_dir, local_files_only, ...).

        Raises:
            PrunerError: a file is missing or damaged, or the two do not belong together.
        """
        config_path, weights_path = _locate(source, revision, hub_options)
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
            version = config.get("format_version")
            sizes = {name: config[name] for name in ("hidden_size", "intermediate_size")}
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise PrunerError(f"{CONFIG_FILE} of {str(source)!r} is not a pruner's: {error!r}") from error
        if version != FORMAT_VERSION:
            raise PrunerError(f"{str(source)!r} has format_version {version!r}; this lp_patch reads {FORMAT_VERSION}")
        try:
            weights = load_file(weights_path)
        except (OSError, SafetensorError) as error:
            raise PrunerError(f"{WEIGHTS_FILE} of {str(source)!r} cannot be read: {error}") from error
        try:
            with torch.device("meta"):
                pruner = cls(**sizes)
        except (PrunerError, RuntimeError, TypeError) as error:  # the last two: more numbers than torch can address
            raise PrunerError(f"{CONFIG_FILE} of {str(source)!r}: {str(error).splitlines()[0]}") from error
        expected = {name: tuple(tensor.shape) for name, tensor in pruner.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if found != expected:
            raise PrunerError(f"{WEIGHTS_FILE} of {str(source)!r} holds {found}, but {CONFIG_FILE} asks for {expected}")
        if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in weights.values()):
            raise PrunerError(f"{WEIGHTS_FILE} of {str(source)!r} must hold finite floating-point numbers")
        pruner.load_state_dict(weights, assign=True)
        return pruner.eval()

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload both files to a Hub model repository, made if missing; returns the commit's address."""
        import tempfile

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload LearnablePruner with lp_patch"
            ).commit_url


def _locate(source: str | Path, revision: str | None, hub_options: dict[str, Any]) -> tuple[Path, Path]:
    """Local paths of the config and the weights of `source`, downloaded if it is a Hub id."""
    if Path(source).is_dir():
        paths = tuple(Path(source) / name for name in (CONFIG_FILE, WEIGHTS_FILE))
        for path in paths:
            if not path.is_file():
                raise PrunerError(
                    f"no {path.name} in the folder {str(source)!r}; a pruner is {CONFIG_FILE} and {WEIGHTS_FILE}"
                )
        return paths[0], paths[1]
    try:
        downloaded = [
            Path(hf_hub_download(str(source), name, revision=revision, **hub_options))
            for name in (CONFIG_FILE, WEIGHTS_FILE)
        ]
    except TypeError:  # an option that hf_hub_download does not have
        raise
    except Exception as error:  # the client lets errors of its HTTP library through, and changes that library
        raise PrunerError(
            f"no pruner at {str(source)!r}: it is no folder here, and the Hub answered {type(error).__name__}: {error}"
        ) from error
    return downloaded[0], downloaded[1]


def resolve_pruner(pruner: object, width: int) -> LearnablePruner | None:
    """The `pruner=` of `apply` as a module of the model's width, or None.

    Args:
        pruner: None, a LearnablePruner, a folder, or a Hub id.
        width: features that the model's projector reads.
    """
    if pruner is None:
        return None
    if isinstance(pruner, (str, Path)):
        pruner = LearnablePruner.from_pretrained(pruner)
    if not isinstance(pruner, LearnablePruner):
        raise PrunerError(
            f"pruner must be a LearnablePruner, a folder or a Hub id, got {type(pruner).__name__}: {pruner!r}"
        )
    if pruner.hidden_size != width:
        raise PrunerError(f"the pruner reads {pruner.hidden_size}-wide features, this model has {width}-wide ones")
    return pruner
