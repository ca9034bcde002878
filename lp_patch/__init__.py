"""Visual-token pruning for vision-language models, as one line on a stock transformers model.

That line is ``patch = lp_patch.apply(model)``.
"""

from pathlib import Path as _Path

_here = _Path(__file__).parent
if not (_here / "adapters").is_dir():
    # a plain checkout keeps the adapters beside this package; an installed wheel has them inside it
    __path__.append(str(_here.parent))

from ._version import __version__
from .calibrate import Calibration, calibrate
from .check import Checks, check
from .config import PruningConfig
from .errors import (
    ConfigError,
    LpPatchError,
    MissingExtraError,
    PrunerError,
    UnsupportedInputError,
    UnsupportedModelError,
)
from .evaluate import Evaluation, evaluate
from .patch import Patch, applied, apply, is_applied, remove
from .pruner import LearnablePruner
from .registry import Adapter, register, supported
from .report import Report
from .trace import Trace

__all__ = [
    "Adapter",
    "Calibration",
    "Checks",
    "ConfigError",
    "Evaluation",
    "LearnablePruner",
    "LpPatchError",
    "MissingExtraError",
    "Patch",
    "PrunerError",
    "PruningConfig",
    "Report",
    "Trace",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "__version__",
    "applied",
    "apply",
    "calibrate",
    "check",
    "evaluate",
    "is_applied",
    "register",
    "remove",
    "supported",
]
