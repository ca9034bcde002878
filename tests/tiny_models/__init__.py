"""Tiny models of the types that transformers maps to image-text-to-text, one file per family."""

from importlib import import_module
from pkgutil import iter_modules

from .common import build, scene

TYPES = {}
for module in sorted(x.name for x in iter_modules(__path__) if x.name != "common"):
    TYPES.update(import_module(f"{__name__}.{module}").TYPES)


def make(model_type, seed=0, dtype=None, which=(0, 1, 2), attention="sdpa", side="left"):
    """The type's model and a batch of some of its rows: 0 has one visual input, 1 several, 2 none."""
    tiny = TYPES[model_type]
    given = {} if dtype is None else {"dtype": dtype}
    return build(tiny, seed=seed, attention=attention, **given), scene(tiny, which=which, side=side, **given)
