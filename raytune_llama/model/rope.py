"""Longer contexts: how a run scales the rotary positions (RoPE) of its model.

What a run was trained with is part of the model: it stands in the config.json of a model that is
written, and in the manifest of an adapter, since PEFT's own files have no place for it.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from transformers import PreTrainedConfig

from raytune_llama.config.settings import ConfigError, settings
from raytune_llama.storage.files import read_manifest

MODEL_SETTINGS_KEY = "model_settings"
"""Key of an adapter's manifest: what differs in the config.json of the model it was trained on."""

_OWN_FIELDS = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow"),
}
_DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@settings
class RopeScaling:
    """Rotary positions for a longer context than the model was trained with."""

    type: Literal["linear", "dynamic", "yarn", "llama3"]
    """`linear`: positions are divided by the factor (arXiv:2306.15595). `yarn`: arXiv:2309.00071.
    `llama3`: as LLaMA 3.1. `dynamic`: only beyond the model's own context, by how far a text goes
    beyond it (NTK); nothing changes in training, whose sequences have to be within it."""

    factor: Annotated[float, Field(gt=1)]
    """Times the model's own context, its `max_position_embeddings`."""

    low_freq_factor: Annotated[float, Field(gt=0)] | None = None
    """Of llama3: wavelengths above the model's own context over this are scaled whole; null: 1."""

    high_freq_factor: Annotated[float, Field(gt=0)] | None = None
    """Of llama3: wavelengths below the model's own context over this stay; null: 4."""

    beta_fast: Annotated[float, Field(gt=0)] | None = None
    """Of yarn: turns within the model's own context above which a dimension stays; null: 32."""

    beta_slow: Annotated[float, Field(gt=0)] | None = None
    """Of yarn: turns below which a dimension is scaled whole; null: 1."""

    @model_validator(mode="after")
    def _check(self) -> "RopeScaling":
        problems = [
            f"{field}: is for {kind} alone, got {self.type}; set it to null"
            for kind, fields in _OWN_FIELDS.items()
            for field in fields
            if kind != self.type and getattr(self, field) is not None
        ]
        if problems:
            raise ConfigError(problems)
        return self


def check_rope_scaling(
    config: PreTrainedConfig, scaling: RopeScaling, sequence_tokens: int
) -> list[str]:
    """Return why a model's positions can't be scaled so; empty where they can.

    Args:
        config: of the model; it is left as it is.
        scaling: of the run.
        sequence_tokens: of a sequence that is trained on.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if not rope or any(isinstance(value, Mapping) for value in rope.values()):
        return [
            f"model.rope_scaling: a {config.model_type} has no rotary positions that are the same "
            "in all layers; set it to null"
        ]
    if rope.get("rope_type", "default") != "default":
        return [
            f"model.rope_scaling: the model has {rope['rope_type']} scaling by "
            f"{rope.get('factor')} of its own; set it to null to keep that"
        ]
    context = config.max_position_embeddings
    if scaling.type == "dynamic" and sequence_tokens > context:
        return [
            f"model.rope_scaling.type: dynamic scales by the longest text of a batch, so that what "
            f"is learned beyond {context} tokens would depend on neighbours; use yarn, or "
            f"batch.sequence_tokens up to {context}, got {sequence_tokens}"
        ]
    values = build_rope_settings(config, scaling)
    scaled = type(config).from_dict(config.to_dict() | {"rope_parameters": None})
    with _warnings() as found:
        try:
            apply_rope_settings(scaled, values)
        except (KeyError, ValueError) as error:
            found.append(str(error))
    return [f"model.rope_scaling: transformers says: {text}" for text in found]


def build_rope_settings(config: PreTrainedConfig, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return what scaling changes in a model's config.json; nothing where it is None."""
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
    # `dynamic` takes the model's own context from this field.
    longer = context if scaling.type == "dynamic" else round(context * scaling.factor)
    return {"rope_parameters": rope, "max_position_embeddings": longer}


def apply_rope_settings(config: PreTrainedConfig, values: Mapping[str, Any]) -> None:
    """Set what `build_rope_settings` returned.

    Raises:
        KeyError: transformers misses a parameter.
        ValueError: it refuses one.
    """
    if not values:
        return
    for field, value in values.items():
        setattr(config, field, dict(value) if isinstance(value, Mapping) else value)
    config.standardize_rope_params()
    config.validate_rope()


def read_model_settings(adapter: Path) -> dict[str, Any]:
    """Return what an adapter was trained with that its base's config.json has otherwise."""
    return dict(read_manifest(adapter).get(MODEL_SETTINGS_KEY) or {})


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what transformers' validation logs, which is how it refuses most values."""
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
