"""Longer contexts: how a run scales the rotary position embeddings (RoPE) of its model.

The scaling is part of the trained model: it is written to a model's config.json, or to an adapter's
manifest, since PEFT's own files have no field for it.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from raytune_llama.model.config import _OWN_FIELDS, RopeScaling
from raytune_llama.storage.files import read_manifest

MODEL_SETTINGS_KEY = "model_settings"
"""Manifest key of the config.json fields in which an adapter's model differs from the base."""

_DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def check_rope_scaling(
    config: PreTrainedConfig,
    scaling: RopeScaling,
    num_tokens: int,
    *,
    field: str = "batch.sequence_tokens",
) -> list[str]:
    """Return why a model's positions can't be scaled as configured; empty if they can.

    Args:
        config: the model's config; it is not modified.
        scaling: the run's RoPE scaling.
        num_tokens: number of positions that training needs: tokens of its longest text.
        field: config field that limits it.
    """
    rope = _shared_rope(config)
    if rope is None:
        return [
            f"model.rope_scaling: a {config.model_type} model has no rotary positions that all "
            "layers share; set it to null"
        ]
    if rope.get("rope_type", "default") != "default":
        return [
            f"model.rope_scaling: the model already has {rope['rope_type']} scaling by "
            f"{rope.get('factor')}; set it to null to keep that"
        ]
    context = config.max_position_embeddings
    if scaling.type == "dynamic" and num_tokens > context:
        return [
            f"model.rope_scaling.type: dynamic scales by the longest sequence of a batch, so that "
            f"training beyond {context} tokens would depend on the other sequences; use yarn, or "
            f"{field} up to {context}, got {num_tokens}"
        ]
    values = build_rope_settings(config, scaling)
    scaled = type(config).from_dict(config.to_dict() | {"rope_parameters": None})
    with _warnings() as found:
        try:
            apply_rope_settings(scaled, values)
        except (KeyError, ValueError) as error:
            found.append(str(error))
    return [f"model.rope_scaling: rejected by transformers: {text}" for text in found]


def context_tokens(config: PreTrainedConfig, scaling: RopeScaling | None = None) -> int | None:
    """Return how many positions a model can be trained on; None if its settings name no limit.

    A scaling in the model's own config.json extends `max_position_embeddings`, unless that already
    exceeds the scaling's `original_max_position_embeddings`, and then includes it. Dynamic scaling
    extends nothing here: training beyond the original context would depend on the other sequences
    of a batch.

    Args:
        config: the model's config; it is not modified.
        scaling: the run's RoPE scaling, which `check_rope_scaling` accepts; None: the model's own.
    """
    own = getattr(config, "max_position_embeddings", None)
    if not isinstance(own, int):
        return None
    if scaling is not None:
        return build_rope_settings(config, scaling)["max_position_embeddings"]
    rope = _own_scaling(config)
    original = rope.get("original_max_position_embeddings")
    is_included = isinstance(original, int) and own > original
    if is_included or rope.get("rope_type") == "dynamic":
        return own
    return round(own * (rope.get("factor") or 1.0))


def check_context(
    config: PreTrainedConfig,
    scaling: RopeScaling | None,
    num_tokens: int,
    *,
    field: str = "batch.sequence_tokens",
    adapter: str | None = None,
) -> list[str]:
    """Return why a model has too few positions for a run; empty if it has enough.

    Args:
        config: the model's config; it is not modified.
        scaling: the run's RoPE scaling, which `check_rope_scaling` accepts.
        num_tokens: number of positions that training needs: tokens of its longest text.
        field: config field that limits it.
        adapter: the adapter that the run continues, whose scaling cannot change.
    """
    context = context_tokens(config, scaling)
    if context is None or num_tokens <= context:
        return []
    own, theirs = config.max_position_embeddings, _own_scaling(config)
    factor = math.ceil(num_tokens / own)
    if scaling is not None:
        has = f"{own}, {context} with model.rope_scaling.factor={scaling.factor:g}"
        longer = f"set model.rope_scaling.factor={factor}"
    elif theirs:
        by = f" by {theirs['factor']:g}" if theirs.get("factor") else ""
        has = f"{own}, {context} with the {theirs['rope_type']} scaling{by} of its config.json"
        longer = "change the scaling there"
    else:
        has = str(own)
        longer = f"set model.rope_scaling.type=yarn model.rope_scaling.factor={factor}"
        if _shared_rope(config) is None:
            longer = "use a model with more"
    if adapter is not None:
        longer = f"{longer} and train a new adapter, since {adapter} was trained with this context"
    return [
        f"{field}: got {num_tokens}, but the model has positions for fewer tokens "
        f"(max_position_embeddings {has}); set {field}={context}, or {longer}"
    ]


def _shared_rope(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    """Return the rotary parameters that all layers share; None if there are none."""
    rope = getattr(config, "rope_parameters", None) or {}
    return None if not rope or any(isinstance(v, Mapping) for v in rope.values()) else rope


def _own_scaling(config: PreTrainedConfig) -> Mapping[str, Any]:
    """Return the rotary parameters of a model that scales its positions; empty if it does not."""
    rope = _shared_rope(config) or {}
    return {} if rope.get("rope_type", "default") == "default" else rope


def build_rope_settings(config: PreTrainedConfig, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return the config.json fields that the scaling changes; empty if it is None."""
    if scaling is None:
        return {}
    context = config.max_position_embeddings
    rope: dict[str, Any] = {
        "rope_type": scaling.type,
        "rope_theta": config.rope_parameters["rope_theta"],
        "factor": scaling.factor,
    }
    if "partial_rotary_factor" in config.rope_parameters:
        rope["partial_rotary_factor"] = config.rope_parameters["partial_rotary_factor"]
    for field in _OWN_FIELDS.get(scaling.type, ()):
        value = getattr(scaling, field)
        value = _DEFAULTS.get(field) if value is None else value
        if value is not None:
            rope[field] = value
    if scaling.type in _OWN_FIELDS:
        rope["original_max_position_embeddings"] = context
    # `dynamic` reads the model's own context from this field.
    longer = context if scaling.type == "dynamic" else round(context * scaling.factor)
    return {"rope_parameters": rope, "max_position_embeddings": longer}


def apply_rope_settings(config: PreTrainedConfig, values: Mapping[str, Any]) -> None:
    """Set the fields that `build_rope_settings` returned.

    Raises:
        KeyError: transformers requires a parameter that is missing.
        ValueError: transformers rejects a parameter.
    """
    if not values:
        return
    for field, value in values.items():
        setattr(config, field, dict(value) if isinstance(value, Mapping) else value)
    config.standardize_rope_params()
    config.validate_rope()


def read_model_settings(adapter: Path) -> dict[str, Any]:
    """Return the config.json fields in which an adapter's model differs from its base."""
    return dict(read_manifest(adapter).get(MODEL_SETTINGS_KEY) or {})


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the warnings of transformers' validation, which is how it rejects most values."""
    found: list[str] = []

    class _Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = _Collect(logging.WARNING)
    theirs = logging.getLogger("transformers.modeling_rope_utils")
    theirs.addHandler(handler)
    try:
        yield found
    finally:
        theirs.removeHandler(handler)
