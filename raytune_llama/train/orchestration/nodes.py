"""Checks of the Ray cluster: that it can hold the workers, and that every node can train."""

import logging
import uuid
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.store.token_store import open_store
from raytune_llama.logs import waiting
from raytune_llama.model.llama import check_model_directory
from raytune_llama.storage.directories import fetched
from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.fetched_inputs import fetch_inputs, find_remote_inputs
from raytune_llama.train.inputs import open_text_store
from raytune_llama.train.tasks import open_tasks

logger = logging.getLogger(__name__)

NODE_CHECK_SECONDS = 120.0


def check_nodes(config: AnyTrainConfig) -> None:
    """Check on every node with room for a worker: shared run directory, model, token store.

    Models that are not on a mounted disk are fetched there first.

    Raises:
        ConfigError: lists every node that fails, and why.
    """
    fetch_on_nodes(config)
    run_dir = config.run_place
    existed = run_dir.exists()
    probes = run_dir / f".probe-{uuid.uuid4().hex}"
    try:
        (probes / "driver").write_bytes(b"driver")
    except OSError as error:
        raise ConfigError([f"run_dir: cannot write to {run_dir}: {error}"]) from error
    try:
        problems = _probe_all(config, probes)
    finally:
        probes.delete()
        if not existed:
            # A run that never started leaves no directory.
            run_dir.delete_empty()
    if problems:
        raise ConfigError(problems)


def fetch_on_nodes(config: AnyTrainConfig) -> None:
    """Fetch model, tokenizer and adapter once to every node with room for a worker.

    Raises:
        ConfigError: lists every node that can't, and why.
    """
    if not find_remote_inputs(config):
        return
    pending = _run_on_nodes(fetch_here, config)
    problems: list[str] = []
    with waiting(
        logger, f"fetching the model on {len(pending)} nodes", usually="10 to 60 s per GB"
    ):
        for ref, name in pending.items():
            try:
                problems += [f"node {name}: {problem}" for problem in ray.get(ref)]
            except RayError as error:
                problems.append(f"node {name}: {error}")
    if problems:
        raise ConfigError(problems)


def fetch_here(config: AnyTrainConfig, _node_id: str) -> list[str]:
    """Fetch a run's inputs and return the problems; runs as a Ray task on a node."""
    try:
        fetch_inputs(config)
    except ConfigError as error:
        return error.problems
    return []


def _run_on_nodes(function: Callable[..., Any], *arguments: Any) -> dict[Any, str]:  # noqa: ANN401
    """Start a task on every node with room for a worker of a config, the first argument.

    The node's id is appended to the arguments. Returns the node's name by the task.
    """
    task: Any = ray.remote(function)
    pending: dict[Any, str] = {}
    needs = arguments[0].scale.worker_needs
    for node in ray.nodes():
        if not needs.count_on(node):
            continue
        here = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        call = task.options(num_cpus=0, scheduling_strategy=here, max_retries=0)
        address = node["NodeManagerAddress"]
        pending[call.remote(*arguments, node["NodeID"])] = f"{address} {node['NodeID'][:8]}"
    return pending


def _probe_all(config: AnyTrainConfig, probes: Place) -> list[str]:
    pending = _run_on_nodes(probe_node, config, probes)
    nodes = "1 node" if len(pending) == 1 else f"{len(pending)} nodes"
    what = f"checking model, token store and run directory on {nodes}"
    with waiting(logger, what, usually="5 to 20 s"):
        done, late = ray.wait(list(pending), num_returns=len(pending), timeout=NODE_CHECK_SECONDS)
    problems = [f"node {pending[ref]}: no answer in {NODE_CHECK_SECONDS:.0f} s" for ref in late]
    for ref in done:
        name = pending[ref]
        try:
            node_id, found = ray.get(ref)
        except RayError as error:
            problems.append(f"node {name}: {error}")
            continue
        problems += [f"node {name}: {problem}" for problem in found]
        if not found and not (probes / node_id).exists():
            problems.append(
                f"node {name}: the driver does not see the files that it writes to "
                f"{config.run_dir}; run_dir must be on storage that every node mounts"
            )
    return problems


def probe_node(config: AnyTrainConfig, probes: Place, node_id: str) -> tuple[str, list[str]]:
    """Return the node's id and its problems; runs as a Ray task on the node."""
    problems = check_model_directory(fetched(config.model.path))
    try:
        if not (probes / "driver").exists():
            problems.append(
                f"run_dir: {config.run_dir} is not the directory that the driver sees; it must be "
                "on storage that every node mounts"
            )
        else:
            (probes / node_id).write_bytes(node_id.encode())
    except OSError as error:
        problems.append(f"run_dir: cannot read and write {config.run_dir}: {error}")
    for field, open_one in (
        ("data.store_dir", lambda: open_store(config.data)),
        ("eval.store_dir", lambda: open_text_store(config)),
        ("eval.tasks", lambda: open_tasks(config)),
    ):
        try:
            open_one()
        except (ValueError, OSError) as error:
            problems.append(f"{field}: {error}")
    return node_id, problems
