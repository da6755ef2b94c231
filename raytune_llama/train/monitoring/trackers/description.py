"""What trackers show of a run: its config, where it comes from, and its result; no credentials."""

import re
from collections.abc import Mapping
from typing import Any

import raytune_llama
from raytune_llama.config.settings import to_dict
from raytune_llama.storage.files import OUTPUT_MANIFEST, json_bytes
from raytune_llama.storage.hashes import hash_bytes
from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig, SftConfig
from raytune_llama.train.monitoring.trackers.tracker import EndState, TrackedRun

START_FILES = ("run.yaml", "sweep.yaml")
"""Files of a run directory that are uploaded when the run starts or resumes."""

END_FILES = ("loss.png", "leaderboard.csv", "sweep.html", "best.yaml")
"""Files of a run directory that are uploaded at its end, besides the manifest of its result."""

TAG_PREFIX = "raytune."

_USER_INFO = re.compile(rb"(?<=://)[^/@\s\"']+@")
_TEXT_SUFFIXES = (".yaml", ".json", ".html", ".csv")


def describe_run(
    config: AnyTrainConfig, identity: Mapping[str, Any], sweep: TrackedRun | None = None
) -> TrackedRun:
    """Return a run as trackers show it.

    Args:
        config: config of the run, with absolute paths.
        identity: recorded identity of the run, with the hashes of its inputs.
        sweep: sweep that it is a trial of; None: none.
    """
    tags = {
        "run_dir": config.run_dir,
        "version": raytune_llama.__version__,
        "base": config.model.path,
        "base_hash": hash_weights_of(identity.get("model") or {}),
        "continues": config.adapter,
        "continues_hash": hash_weights_of(identity.get("adapter") or {}),
        "store": config.data.store_dir,
        "store_hash": identity.get("store"),
        "tokenizer_hash": identity.get("tokenizer"),
    }
    return TrackedRun(
        run_dir=config.run_place,
        name=config.run_place.name,
        job="sft" if isinstance(config, SftConfig) else "pretrain",
        config=redact(to_dict(config)),
        tags=name_tags(tags),
        group=sweep.name if sweep else None,
        parent_dir=sweep.run_dir if sweep else None,
    )


def end_tags(state: EndState, result: Place | None) -> dict[str, str]:
    """Return the tags that a run gets at its end.

    Args:
        state: how it has ended.
        result: directory of its result; None: it has none.
    """
    tags: dict[str, Any] = {"state": state}
    if result is not None and (result / OUTPUT_MANIFEST).status() is not None:
        manifest = (result / OUTPUT_MANIFEST).read_json()
        tags |= {
            "result": str(result),
            "result_hash": hash_weights_of(manifest.get("files") or {}),
            "result_step": manifest.get("step"),
        }
    return name_tags(tags)


def name_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Return tags with our prefix, without those that are not set."""
    return {
        f"{TAG_PREFIX}{name}": str(redact(value))
        for name, value in tags.items()
        if value is not None
    }


def hash_weights_of(files: Mapping[str, str]) -> str | None:
    """Return one hash that names the weights of an adapter or a model; None without weights.

    It is that of the weight file if there is one alone, else the hash of all their hashes.

    Args:
        files: hashes of files by name; those that are no weights are ignored.
    """
    weights = {
        name: digest for name, digest in files.items() if name.endswith((".safetensors", ".bin"))
    }
    if len(weights) <= 1:
        return next(iter(weights.values()), None)
    return hash_bytes(json_bytes(weights))


def redact(value: Any) -> Any:  # noqa: ANN401  # any plain data
    """Return plain data without the user names and passwords of URLs."""
    if isinstance(value, str):
        return redact_file(".json", value.encode()).decode()
    if isinstance(value, Mapping):
        return {key: redact(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [redact(inner) for inner in value]
    return value


def redact_file(name: str, data: bytes) -> bytes:
    """Return the content of a text file without the user names and passwords of URLs."""
    return _USER_INFO.sub(b"", data) if name.endswith(_TEXT_SUFFIXES) else data


def flatten(value: Any, path: str = "") -> dict[str, Any]:  # noqa: ANN401  # any plain data
    """Return the leaves of nested mappings and lists, by dotted path."""
    if isinstance(value, Mapping) and value:
        parts = value.items()
    elif isinstance(value, list) and value:
        parts = enumerate(value)
    else:
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, inner in parts:
        leaves |= flatten(inner, f"{path}.{key}" if path else str(key))
    return leaves
