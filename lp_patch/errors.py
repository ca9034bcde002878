"""Every error that lp_patch raises on purpose; each is also the built-in that fits.

LpPatchError
├── ConfigError (ValueError)            an option, or a pair of options, is wrong
├── UnsupportedModelError (TypeError)   no adapter fits this model, or its internals moved
├── UnsupportedInputError (ValueError)  this call cannot be pruned correctly, so it is refused
├── PrunerError (ValueError)            pruner weights are missing, damaged or do not fit
└── MissingExtraError (ImportError)     what was asked for needs a package of an optional extra
"""


class LpPatchError(Exception):
    """Base of all errors of this library."""


class ConfigError(LpPatchError, ValueError):
    """An option is misspelt, out of range or contradicts another one."""


class UnsupportedModelError(LpPatchError, TypeError):
    """The object is no model that an adapter knows, or a declared patch point is missing."""


class UnsupportedInputError(LpPatchError, ValueError):
    """The patched model was called in a way that cannot be pruned correctly."""


class PrunerError(LpPatchError, ValueError):
    """Pruner weights are missing, damaged, or made for another width."""


class MissingExtraError(LpPatchError, ImportError):
    """A package of an optional extra is not installed."""
