"""What cannot be packed, found from configs and the base's structure before anything starts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from raytune_llama.config.settings import to_dict
from raytune_llama.train.config import AnyTrainConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose packs are tested. In others a layer may see the tokens of all runs (recurrence,
convolution, experts) or draw for all of them (dropout in a function)."""

_TABLES = ("embed_tokens", "lm_head")
_SHARED_SECTIONS = ("model", "engine", "scale")


def check_packable(config: AnyTrainConfig) -> list[str]:
    """Return which fields of a run a pack does not support; empty if it can be packed."""
    lora = config.lora
    if lora is None:
        got = "an adapter to continue" if config.adapter is not None else f"train={config.train}"
        return [
            f"lora: got null with {got}, but the runs of a pack train new adapters on one frozen "
            "base; set train=lora and lora, or pack to null"
        ]
    problems: list[str] = []
    if config.engine.strategy != "ddp":
        problems.append(
            f"engine.strategy: got {config.engine.strategy}, which shards what the runs of a pack "
            "share; set engine.strategy=ddp, or pack to null"
        )
    if config.model.quantization is not None:
        problems.append(
            f"model.quantization: got {config.model.quantization}, whose products round "
            "differently in a pack; set it and pack to null, or only one of them"
        )
    if config.model.attention == "flash_attention_2":
        problems.append(
            "model.attention: got flash_attention_2, but a pack attends with PyTorch's SDPA; set "
            "it to sdpa or auto, or pack to null"
        )
    if lora.init != "default":
        problems.append(
            f"lora.init: got {lora.init}, which trains on a base of its own, the residual; use "
            "default, or set pack to null"
        )
    if lora.dora:
        problems.append(
            "lora.dora: got true, whose magnitudes need the norms of each run's merged weights; "
            "set it to false, or pack to null"
        )
    others = [name for name in lora.modules_to_save if name.rpartition(".")[2] not in _TABLES]
    if others:
        problems.append(
            f"lora.modules_to_save: got {', '.join(others)}, which is inside the layers that the "
            f"runs of a pack share; only {' and '.join(_TABLES)} can be trained, each run with a "
            "table of its own; remove the others, or set pack to null"
        )
    return problems


def check_shared(configs: Iterable[AnyTrainConfig]) -> list[str]:
    """Return which fields differ between runs that are to share one base in a pack."""
    values: dict[str, set[str]] = {}
    for config in configs:
        for field, value in _flatten(to_dict(config)):
            if field.partition(".")[0] in _SHARED_SECTIONS:
                values.setdefault(field, set()).add(repr(value))
    return [
        f"space.{field}: its values {', '.join(sorted(found))} differ between runs that share one "
        "base in a pack; give it one value in fixed, or set pack to null"
        for field, found in values.items()
        if len(found) > 1
    ]


def check_packable_model(model: PreTrainedModel) -> list[str]:
    """Return why a base cannot be shared by several runs; its weights are not needed."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        return [
            f"model.path: its model type is {kind}, but packs are tested only with "
            f"{', '.join(FAMILIES)}; set pack to null"
        ]
    rope = getattr(model.config, "rope_parameters", None)
    if isinstance(rope, Mapping) and rope.get("rope_type") == "longrope":
        return [
            "model.path: it has longrope positions, which depend on the longest sequence that is "
            "computed at once, and so on the other runs of a pack; set pack to null"
        ]
    return []


def _flatten(data: Any, path: Sequence[str] = ()) -> Iterable[tuple[str, Any]]:  # noqa: ANN401
    """Yield the leaves of nested mappings with their dotted paths."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _flatten(value, (*path, str(key)))
    else:
        yield ".".join(path), data
