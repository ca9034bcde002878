"""Tiny models of the types that transformers maps to image-text-to-text, one file per family."""

from importlib import import_module
from pkgutil import iter_modules

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .common import build, scene

NEWEST = (5, 24)  # the version that has all of them
_OLDER = tuple(int(x) for x in transformers.__version__.split(".")[:2]) < NEWEST

TYPES = {}
for module in sorted(x.name for x in iter_modules(__path__) if x.name != "common"):
    try:
        found = import_module(f"{__name__}.{module}").TYPES
    except ImportError:
        if not _OLDER:
            raise
        continue
    TYPES.update({key: tiny for key, tiny in found.items() if not _OLDER or key.split(":")[0] in CONFIG_MAPPING_NAMES})


def make(model_type, seed=0, dtype=None, which=(0, 1, 2), attention="sdpa", side="left"):
    """The type's model and a batch of some of its rows: 0 has one visual input, 1 several, 2 none."""
    tiny = TYPES[model_type]
    given = {} if dtype is None else {"dtype": dtype}
    return build(tiny, seed=seed, attention=attention, **given), scene(tiny, which=which, side=side, **given)
