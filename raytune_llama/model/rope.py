"""Longer contexts: how a run scales the rotary position embeddings (RoPE) of its model.

The scaling is part of the trained model: it is written to a model's config.json, or to an adapter's
manifest, since PEFT's own files have no field for it.
"""

import logging
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
    config: PreTrainedConfig, scaling: RopeScaling, sequence_tokens: int
) -> list[str]:
    """Return why a model's positions can't be scaled as configured; empty if they can.

    Args:
        config: the model's config; it is not modified.
        scaling: the run's RoPE scaling.
        sequence_tokens: tokens per training sequence.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if not rope or any(isinstance(value, Mapping) for value in rope.values()):
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
    if scaling.type == "dynamic" and sequence_tokens > context:
        return [
            f"model.rope_scaling.type: dynamic scales by the longest sequence of a batch, so that "
            f"training beyond {context} tokens would depend on the other sequences; use yarn, or "
            f"batch.sequence_tokens up to {context}, got {sequence_tokens}"
        ]
    values = build_rope_settings(config, scaling)
    scaled = type(config).from_dict(config.to_dict() | {"rope_parameters": None})
    with _warnings() as found:
        try:
            apply_rope_settings(scaled, values)
        except (KeyError, ValueError) as error:
            found.append(str(error))
    return [f"model.rope_scaling: rejected by transformers: {text}" for text in found]


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
