"""Adds merges and evaluations to the tracked run that their model comes from.

The manifest of a run's result names the run in its trackers, and a merge passes that on: the page
of a run shows what became of it: each merge and evaluation with its path and hashes as tags, the
scores as metrics, and its files. A manifest may be a stranger's: nothing is sent to an MLflow
server but that of MLFLOW_TRACKING_URI.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from raytune_llama.evaluate.config import EvaluateConfig
from raytune_llama.evaluate.results import RESULTS_FILE, EvaluationResults, ModelResults
from raytune_llama.merge.config import MergeConfig
from raytune_llama.model.adapter_lineage import fingerprint_model
from raytune_llama.model.lineage import TRACKERS_KEY, find_trackers
from raytune_llama.storage.directories import fetched
from raytune_llama.storage.files import OUTPUT_MANIFEST
from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.config import LoggingConfig, MlflowConfig, WandbConfig
from raytune_llama.train.monitoring.trackers.description import (
    hash_weights_of,
    name_tags,
    redact_file,
)
from raytune_llama.train.monitoring.trackers.session import build_trackers, find_problems
from raytune_llama.train.monitoring.trackers.tracker import (
    MetricPoint,
    RefusedError,
    RunAddress,
    Tracker,
    UnreachableError,
)

logger = logging.getLogger(__name__)

_ADDRESS: pydantic.TypeAdapter[RunAddress] = pydantic.TypeAdapter(RunAddress)

SEND_SECONDS = 30.0
"""Seconds that a merge or an evaluation waits for each tracker at most."""


@dataclass(frozen=True)
class Descendant:
    """A merge or an evaluation of a tracked run."""

    name: str
    """Name of the tags, metrics and files: `merge` or `evaluation`, and its directory's name."""

    tags: Mapping[str, str]
    """What it was made of: paths and hashes."""

    files: Mapping[str, bytes]
    """Content by name."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Scores by name."""


def log_merge(config: MergeConfig) -> None:
    """Add a merge to the run of its last adapter, if that is tracked; see `_log`."""
    target = Place.parse(config.target, "target")
    content = (target / OUTPUT_MANIFEST).read_bytes()
    manifest: dict[str, Any] = json.loads(content)
    addresses = manifest[TRACKERS_KEY]
    if not addresses:
        return
    inputs: dict[str, dict[str, str]] = manifest["merged"]["inputs"]
    tags: dict[str, Any] = {
        "path": str(target),
        "base": manifest["config"]["base"],
        "adapters": ", ".join(manifest["config"]["adapters"]),
        "base_hash": hash_weights_of(inputs["base"]),
        "adapter_hashes": ", ".join(
            str(hash_weights_of(files)) for name, files in inputs.items() if name != "base"
        ),
    }
    if config.output_format == "huggingface" and target.is_local:
        tags["hash"] = hash_weights_of(fingerprint_model(target.path))
    name = f"merge.{target.name}"
    files = {f"merge/{target.name}/{OUTPUT_MANIFEST}": content}
    _log(addresses, Descendant(name, _prefixed(name, tags), files))


def log_evaluation(config: EvaluateConfig, results: EvaluationResults) -> None:
    """Add the scores of each model to the run that it comes from, if that is tracked; see `_log`.

    Args:
        config: config of the evaluation.
        results: its results, with the models in the order of the config.
    """
    folder = Path(config.run_dir)
    resolved: list[dict[str, Any]] = results.settings["models"]
    for model, places, found in zip(config.models, resolved, results.models, strict=True):
        if model.path is None:
            continue
        addresses = find_trackers(
            [fetched(path, weights=False) for path in (places["path"], *places["adapters"])]
        )
        if not addresses:
            continue
        name = f"evaluation.{folder.name}"
        tags = {"path": str(folder.absolute()), "model": found.model.source, "name": model.label}
        tags |= {
            "hashes": ", ".join(f"{part} {digest}" for part, digest in found.model.hashes.items())
        }
        files = {f"evaluation/{folder.name}/{RESULTS_FILE}": (folder / RESULTS_FILE).read_bytes()}
        scores = _scores(found, f"evaluation/{folder.name}")
        _log(addresses, Descendant(name, _prefixed(name, tags), files, scores))


def _prefixed(name: str, tags: Mapping[str, Any]) -> dict[str, str]:
    return name_tags({f"{name}.{key}": value for key, value in tags.items()})


def _scores(model: ModelResults, prefix: str) -> dict[str, float]:
    """Return the scores of a model by the name of their metric."""
    scores = {f"{prefix}/{text.name}/bits_per_byte": text.bits_per_byte for text in model.texts}
    for task in model.tasks:
        for name, metric in task.metrics.items():
            scores[f"{prefix}/{task.task}/{name}"] = metric.value
    for group in model.groups:
        label = "/".join([group.benchmark, *([group.group] if group.group else [])])
        scores[f"{prefix}/{label}/{group.metric}"] = group.by_questions.value
    return scores


def _log(addresses: Mapping[str, Any], descendant: Descendant) -> None:
    """Add to a tracked run; what a tracker does not take within `SEND_SECONDS` is a warning."""
    for key, fields in addresses.items():
        try:
            address = _ADDRESS.validate_python(fields)
        except pydantic.ValidationError:
            logger.warning("%s is not logged to a run: %s names none", descendant.name, fields)
            continue
        if key == "mlflow" and address.server != os.environ.get("MLFLOW_TRACKING_URI"):
            logger.info(
                "%s is not logged to its run at %s: set MLFLOW_TRACKING_URI to that if it is yours",
                descendant.name,
                address.server,
            )
            continue
        if key == "wandb" and address.url is None:
            logger.info("%s is not logged to its run: that was logged offline", descendant.name)
            continue
        config = _logging_config(key, address)
        problems = find_problems(config, Place.local(Path.cwd()))
        if problems:
            logger.warning("%s is not logged to its run: %s", descendant.name, problems[0])
            continue
        (tracker,) = build_trackers(config)
        _send(tracker, address, descendant)


def _logging_config(key: str, address: RunAddress) -> LoggingConfig:
    if key == "mlflow":
        return LoggingConfig(mlflow=MlflowConfig(uri=address.server, experiment=address.project))
    return LoggingConfig(wandb=WandbConfig(entity=address.server or None, project=address.project))


def _send(tracker: Tracker, address: RunAddress, descendant: Descendant) -> None:
    """Send in a thread, so that a tracker that does not answer ends neither this job nor its time.

    The thread is left alone after `SEND_SECONDS`.
    """
    problem = [f"{tracker.name} does not answer within {SEND_SECONDS:.0f} s"]

    def send() -> None:
        try:
            _add(tracker, address, descendant)
        except (UnreachableError, RefusedError) as error:
            problem[0] = f"{tracker.name}: {error}"
        else:
            problem.clear()

    thread = threading.Thread(target=send, name=f"tracker {tracker.key}", daemon=True)
    thread.start()
    thread.join(SEND_SECONDS)
    if thread.is_alive():
        tracker.abandon()
    if problem:
        logger.warning("%s is not logged to its run: %s", descendant.name, problem[0])
    else:
        logger.info("%s is logged to %s", descendant.name, address.url or address.id)


def _add(tracker: Tracker, address: RunAddress, descendant: Descendant) -> None:
    run = tracker.reopen(address)
    run.tag(descendant.tags)
    now = time.time()
    points = [MetricPoint(name, value, 0, now) for name, value in descendant.metrics.items()]
    if points:
        run.log(points)
    for name, data in descendant.files.items():
        run.upload(name, redact_file(name, data))
    run.end(None)
