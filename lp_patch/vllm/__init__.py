"""Stage 1 in a vLLM server: `overrides` says what to pass as ``hf_overrides``, `register` is vLLM's entry point.

Nothing here imports vLLM before vLLM asks, so that `overrides` also works where it is not installed.
"""

from .options import overrides

__all__ = ["overrides", "register"]


def register() -> None:
    """The entry point ``vllm.general_plugins``: make the ``LpPatch...`` architectures known, in each of its processes.

    Raises:
        UnsupportedModelError: this vLLM lacks a name that lp_patch uses; it says which.
    """
    from .internals import MODELS_CONFIG_MAP, ModelRegistry
    from .options import ARCHITECTURES
    from .verify import Verified

    for ours in ARCHITECTURES.values():
        ModelRegistry.register_model(ours, f"lp_patch.vllm.families:{ours}")
        MODELS_CONFIG_MAP[ours] = Verified
