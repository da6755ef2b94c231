"""Read the adapter_config.json of a LoRA adapter, through a list of all fields that are known.

A field that changes what the adapter does, and that is not implemented here, is refused by name
unless it has PEFT's default; so is a field that this release does not know.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raytune_llama.config.errors import UserError
from raytune_llama.storage.files import read_json

ADAPTER_CONFIG_FILE = "adapter_config.json"

_USED = frozenset(
    {
        *("peft_type", "task_type", "base_model_name_or_path", "ensure_weight_tying"),
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "trainable_token_indices", "bias", "init_lora_weights"),
    }
)
"""Fields that decide what an adapter does."""

_TRAINING = frozenset(
    {
        *("lora_dropout", "inference_mode", "auto_mapping", "peft_version", "revision"),
        # PEFT ignores it for linear layers; no other layers are supported here.
        "fan_in_fan_out",
        *("megatron_core", "runtime_config", "qalora_group_size"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    }
)
"""Fields that concern how it was trained, or only fields that are refused."""

_UNSUPPORTED: Mapping[str, str] = {
    "lora_bias": "it adds trained biases to the low-rank updates",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it acts only after its invocation tokens",
    "target_parameters": "it adapts parameters that are not of linear layers",
    "arrow_config": "it chooses among several adapters",
    "megatron_config": "it adapts layers of Megatron",
    "use_qalora": "it pools its inputs by groups",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "it scales its updates by trained singular values",
    "monteclora_config": "it samples its factors",
    "velora_config": "it compresses activations",
}
"""Fields that are not implemented, and why they matter."""

_PLAIN_STARTS = frozenset({"gaussian", "orthogonal", "eva"})
"""Initializations that leave the base as it is, besides true and false."""


def read_adapter_config(path: Path, field: str) -> dict[str, Any]:
    """Read the config of a LoRA adapter for a causal LM.

    Args:
        path: Directory of the adapter.
        field: Config field that names the directory, for errors.

    Raises:
        ValueError: The file is missing or damaged, the adapter is of another kind, or its effect
            is not implemented; lists every problem.
    """
    file = path / ADAPTER_CONFIG_FILE
    if not file.is_file():
        what = f"{path} is not a directory" if not path.is_dir() else f"{path} has no {file.name}"
        raise UserError(f"{field}: {what}; name a directory written by PEFT")
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise UserError(f"{field}: {file} is not a JSON object; restore the file")
    problems = list(_find_problems(settings))
    if problems:
        raise UserError("\n".join(f"{field}: {file}: {problem}" for problem in problems))
    return settings


def _find_problems(settings: Mapping[str, Any]) -> Iterator[str]:
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if kind != "LORA":
        yield f"peft_type is {kind}, but only LORA is supported; convert it with PEFT"
        return
    if task not in (None, "CAUSAL_LM"):
        yield f"task_type is {task}, but only adapters of causal LMs are supported"
    if settings.get("bias") not in (None, "none", "all", "lora_only"):
        yield f"bias is {settings['bias']!r}, wanted none, all or lora_only"
    yield from _find_bad_scales(settings)
    yield from _find_changed_base(settings.get("init_lora_weights"))
    for name, reason in _UNSUPPORTED.items():
        if settings.get(name):
            yield f"{name} is not supported, since {reason}; merge the adapter with PEFT"
    for name in sorted(settings.keys() - _USED - _TRAINING - _UNSUPPORTED.keys()):
        if settings[name] not in (None, False, {}, []):
            yield (
                f"{name} is {settings[name]!r}, a field that this release does not know; it may "
                "change what the adapter does: merge the adapter with the version of PEFT that "
                "wrote it"
            )


def _find_bad_scales(settings: Mapping[str, Any]) -> Iterator[str]:
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not _is_rank(rank):
        yield f"r is {rank!r}, wanted a rank of at least 1; the file is incomplete"
    if not _is_number(alpha):
        yield f"lora_alpha is {alpha!r}, wanted a number; the file is incomplete"
    for name, check in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        pattern = settings.get(name) or {}
        if not isinstance(pattern, dict) or not all(map(check, pattern.values())):
            yield f"{name} is {pattern!r}, wanted numbers by module"


def _find_changed_base(start: object) -> Iterator[str]:
    """Yield why an initialization is refused: most others subtract something from the base."""
    if start is None or isinstance(start, bool) or start in _PLAIN_STARTS:
        return
    yield (
        f"init_lora_weights is {start!r}, which modifies the base before training, so that the "
        "adapter does not fit the base on disk; convert it to a plain LoRA with PEFT "
        "(save_pretrained with path_initial_model_for_weight_conversion)"
    )


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
