"""Checks of the Ray cluster: that it can hold the workers, and that every node can train."""

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.store.token_store import open_store
from raytune_llama.logs import waiting
from raytune_llama.model.llama import check_model_directory
from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.orchestration.config import ScaleConfig

logger = logging.getLogger(__name__)

RESOURCE_POLL_SECONDS = 5.0
NODE_CHECK_SECONDS = 120.0


def is_submitted_job() -> bool:
    """Whether this process is the driver of a job that was submitted to a cluster."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def wait_for_resources(scale: ScaleConfig) -> None:
    """Wait until the nodes can hold the minimum number of workers, at most `wait_seconds`.

    Raises:
        ConfigError: the nodes still cannot hold them after `wait_seconds`.
    """
    needs = scale.worker_resources
    shortage = find_shortage(ray.nodes(), needs, scale)
    if shortage is None:
        return
    start = time.monotonic()
    with _requested([needs] * scale.min_workers):
        while shortage is not None:
            waited = time.monotonic() - start
            if waited >= scale.wait_seconds:
                raise ConfigError([shortage])
            logger.info(
                "waiting for nodes (%.0f of %.0f s): %s", waited, scale.wait_seconds, shortage
            )
            time.sleep(min(RESOURCE_POLL_SECONDS, scale.wait_seconds - waited))
            shortage = find_shortage(ray.nodes(), needs, scale)


@contextlib.contextmanager
def _requested(bundles: list[dict[str, float]]) -> Iterator[None]:
    """Request nodes from the autoscaler while the block runs."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)
    try:
        yield
    finally:
        # A request outlives its job, so the cluster would never scale down.
        request_resources(bundles=[])


def find_shortage(
    nodes: list[dict[str, Any]], needs: dict[str, float], scale: ScaleConfig
) -> str | None:
    """Return why the nodes of a cluster cannot hold the workers, or None.

    Args:
        nodes: nodes as `ray.nodes()` lists them.
        needs: resources per worker.
        scale: scale settings; an elastic run needs room for its minimum number of workers.
    """
    alive = [node for node in nodes if node["Alive"]]
    held = count_worker_slots(nodes, needs)
    if held >= scale.min_workers:
        return None
    have = "; ".join(
        f"{node['NodeManagerAddress']}: {node['Resources'].get('CPU', 0):g} CPUs, "
        f"{node['Resources'].get('GPU', 0):g} GPUs"
        for node in alive
    )
    have = have or "no node is alive"
    field = "scale.num_workers.min" if scale.elastic_range else "scale.num_workers"
    remedy = "lower it, add nodes"
    if scale.use_gpu and not any(node["Resources"].get("GPU") for node in alive):
        field, remedy = "scale.use_gpu", "set it to false, add nodes with GPUs"
    elif held == 0:
        # Fewer workers would not help: a single one does not fit on any node.
        field, remedy = "scale.cpus_per_worker", "lower it, add larger nodes"
    wants = " and ".join(f"{amount:g} {name}" for name, amount in needs.items())
    return (
        f"{field}: {scale.min_workers} workers with {wants} each are required, but the cluster can "
        f"hold {held} ({have}); {remedy}, or set scale.wait_seconds if the cluster autoscales"
    )


def worker_nodes(needs: dict[str, float]) -> list[dict[str, Any]]:
    """Return the nodes that can hold at least one worker."""
    return [node for node in ray.nodes() if node["Alive"] and _num_held(node, needs) > 0]


def count_worker_slots(nodes: list[dict[str, Any]], needs: dict[str, float]) -> int:
    """Return how many workers the nodes of a cluster can hold at a time.

    Args:
        nodes: nodes as `ray.nodes()` lists them.
        needs: resources per worker.
    """
    return sum(_num_held(node, needs) for node in nodes if node["Alive"])


def _num_held(node: dict[str, Any], needs: dict[str, float]) -> int:
    return min(int(node["Resources"].get(name, 0.0) // amount) for name, amount in needs.items())


def check_nodes(config: AnyTrainConfig) -> None:
    """Check on every node with room for a worker: shared run directory, model, token store.

    Raises:
        ConfigError: lists every node that fails, and why.
    """
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


def _probe_all(config: AnyTrainConfig, probes: Place) -> list[str]:
    task: Any = ray.remote(probe_node)
    pending: dict[Any, str] = {}
    for node in worker_nodes(config.scale.worker_resources):
        here = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        call = task.options(num_cpus=0, scheduling_strategy=here, max_retries=0)
        address = node["NodeManagerAddress"]
        pending[call.remote(config, probes, node["NodeID"])] = f"{address} {node['NodeID'][:8]}"
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
    problems = check_model_directory(Path(config.model.path))
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
    try:
        open_store(config.data)
    except (ValueError, OSError) as error:
        problems.append(f"data.store_dir: {error}")
    return node_id, problems
