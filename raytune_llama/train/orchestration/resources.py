"""The resources of a run's workers: wait for them, or report why the cluster cannot have them.

What nodes hold for other programs is waited for without limit; nodes that do not exist, at most
`scale.wait_seconds`.
"""

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import ray
from ray._private.state import state
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  # compiled
from ray.core.generated.autoscaler_pb2 import (
    GetClusterStatusReply,  # pyright: ignore[reportAttributeAccessIssue]  # made by protobuf
)
from ray.exceptions import RpcError
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from raytune_llama.capacity import ACCELERATOR_PREFIX, WorkerNeeds, accelerator_types
from raytune_llama.config.settings import ConfigError
from raytune_llama.logs import WAIT_SECONDS
from raytune_llama.signals import StopSignal
from raytune_llama.train.orchestration.config import ScaleConfig

logger = logging.getLogger(__name__)

RESOURCE_POLL_SECONDS = 5.0

FREE_POLL_SECONDS = 1.0

WAIT_LOG_SECONDS = 30.0
"""Seconds between two log lines of a run that waits for what others use."""

STATUS_TIMEOUT_SECONDS = 10.0
"""Timeout for the autoscaler's report."""

_REFUSAL = "and the autoscaler reports that it cannot add such nodes"


def wait_for_resources(scale: ScaleConfig) -> None:
    """Wait until the nodes can hold the minimum number of workers, at most `wait_seconds`.

    Raises:
        ConfigError: the nodes still cannot hold them after `wait_seconds`, or an autoscaler reports
            that it cannot add nodes that would.
    """
    shortage = find_shortage(ray.nodes(), scale)
    if shortage is None:
        return
    if not scale.wait_seconds:
        raise ConfigError([shortage])
    start = time.monotonic()
    with ResourceRequest(scale) as request:
        while shortage is not None:
            waited = time.monotonic() - start
            is_refused, failures = request.read_autoscaler()
            if is_refused:
                raise ConfigError([f"{shortage}; {_REFUSAL}"])
            causes = f"; the autoscaler failed to start {', '.join(failures)}" if failures else ""
            if waited >= scale.wait_seconds:
                raise ConfigError([shortage + causes])
            logger.info(
                "waiting for nodes (%.0f of %.0f s): %s%s",
                *(waited, scale.wait_seconds, shortage, causes),
            )
            time.sleep(min(RESOURCE_POLL_SECONDS, scale.wait_seconds - waited))
            shortage = find_shortage(ray.nodes(), scale)


def wait_until_free(scale: ScaleConfig, stop: StopSignal) -> bool:
    """Wait until the minimum number of workers fits besides what others run on the nodes.

    Nodes that could not hold the workers even if they were free are not waited for.

    Args:
        scale: scale settings of the run.
        stop: stop signal that ends the wait.

    Returns:
        Whether the workers may start; False if the run was asked to stop.
    """
    if not describe_used(scale):
        return True
    start = time.monotonic()
    next_log = start + WAIT_SECONDS
    # Until the workers fit, an autoscaler may add nodes for them.
    with ResourceRequest(scale) as request:
        while (used := describe_used(scale)) and not request.is_met():
            now = time.monotonic()
            if now >= next_log:
                next_log = now + WAIT_LOG_SECONDS
                logger.info("waiting for what others use (%.0f s): %s", now - start, used)
            if stop.wait(FREE_POLL_SECONDS):
                return False
    return True


def describe_used(scale: ScaleConfig) -> str | None:
    """Return why the workers do not fit besides what others run; None: they fit, or never will."""
    needs, nodes = scale.worker_needs, ray.nodes()
    free = state.available_resources_per_node()
    fit = needs.count_free(nodes, free)
    if fit >= scale.min_workers or needs.count(nodes) < scale.min_workers:
        return None
    own = ", ".join(
        f"{node['NodeManagerAddress']}: "
        + ", ".join(
            f"{free.get(node['NodeID'], {}).get(name, 0):g} of {node['Resources'][name]:g} {name}"
            for name in needs.resources
            if not name.startswith(ACCELERATOR_PREFIX)
        )
        for node in nodes
        if needs.count_on(node)
    )
    return (
        f"{scale.min_workers} workers with {needs.describe()} each are required, {fit} fit; "
        f"free are {own}"
    )


class ResourceRequest:
    """A request for the minimum number of a run's workers; withdrawn at the end of the block.

    A pending placement group is a request to Ray's scheduler and to an autoscaler alike: it is met
    once all workers fit at once, and ends with the driver at the latest.
    """

    def __init__(self, scale: ScaleConfig) -> None:
        """Request the resources.

        Args:
            scale: scale settings of the run.
        """
        self._scale, needs, count = scale, scale.worker_needs, scale.min_workers
        labels: Any = [dict(needs.labels)] * count if needs.labels else None
        self._group = placement_group(
            [dict(needs.resources)] * count,
            strategy=scale.placement.upper(),
            bundle_label_selector=labels,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        remove_placement_group(self._group)

    def is_met(self) -> bool:
        """Whether all workers fit now."""
        return placement_group_table(self._group).get("state") == "CREATED"

    def read_autoscaler(self) -> tuple[bool, list[str]]:
        """Return what the cluster's autoscaler reports.

        Returns:
            Whether it reports that no nodes that it may add would meet the request; and the nodes
            that it failed to start, with their causes. Neither without an autoscaler.
        """
        try:
            client: Any = GcsClient(address=ray.get_runtime_context().gcs_address)
            serialized = client.get_cluster_status(timeout_s=STATUS_TIMEOUT_SECONDS)
        except RpcError as error:
            logger.warning("cannot read the autoscaler's report: %s", error)
            return False, []
        reply: Any = GetClusterStatusReply()
        reply.ParseFromString(serialized)
        types = {node.ray_node_type_name for node in reply.cluster_resource_state.node_states}
        if not has_autoscaler(types, os.environ):
            return False, []
        report = reply.autoscaling_state
        failures = [
            f"{failed.ray_node_type_name} ({failed.reason})"
            for failed in report.failed_instance_requests
        ]
        is_refused = refuses_for_good(reply, self._group.id.hex())
        return is_refused and not self._is_shared(), failures

    def _is_shared(self) -> bool:
        needs, nodes = self._scale.worker_needs, ray.nodes()
        free = state.available_resources_per_node()
        return needs.count_free(nodes, free) < needs.count(nodes)


def refuses_for_good(reply: Any, group: str) -> bool:  # noqa: ANN401  # a message of protobuf
    """Whether an autoscaler reports that no nodes that it may add would hold a placement group.

    It reports the same of a group that would fit if other groups did not wait for those nodes too;
    such a report is not final.

    Args:
        reply: Ray's `GetClusterStatusReply`.
        group: id of the placement group, in hexadecimal digits.
    """
    report, requests = reply.autoscaling_state, reply.cluster_resource_state
    if group not in map(_group_id, report.infeasible_gang_resource_requests):
        return False
    others = {*map(_group_id, requests.pending_gang_resource_requests)} - {group}
    return not (others or report.pending_instance_requests or report.pending_instances)


def _group_id(gang: Any) -> str:  # noqa: ANN401  # a message of protobuf
    # `ID:STRATEGY|STATE`
    return gang.details.partition(":")[0]


def has_autoscaler(node_types: Iterable[str], environment: Mapping[str, str]) -> bool:
    """Whether a cluster adds nodes; else Ray reports all that does not fit as impossible.

    Args:
        node_types: names of the types of the nodes, empty if a node has none: those that an
            autoscaler or KubeRay has started have one.
        environment: environment of a process on the head.
    """
    start = environment.get("KUBERAY_GEN_RAY_START_CMD", "")
    # KubeRay starts a head without its own monitor if the autoscaler is a container beside it.
    if "--head" in start and "--no-monitor" not in start:
        return False
    return any(node_types)


def find_shortage(nodes: Sequence[Mapping[str, Any]], scale: ScaleConfig) -> str | None:
    """Return why the nodes of a cluster cannot hold the workers, or None.

    Args:
        nodes: nodes as `ray.nodes()` lists them.
        scale: scale settings; an elastic run needs room for its minimum number of workers.
    """
    needs = scale.worker_needs
    held = needs.count(nodes)
    if held >= scale.min_workers:
        return None
    alive = [node for node in nodes if node["Alive"]]
    have = "; ".join(map(needs.describe_node, alive)) or "no node is alive"
    field, remedy = _find_obstacle(alive, needs, scale)
    where = ", each on a node of its own," if needs.is_alone else ""
    wait = "" if scale.wait_seconds else ", or set scale.wait_seconds if the cluster autoscales"
    return (
        f"{field}: {scale.min_workers} workers with {needs.describe()} each{where} are required, "
        f"but the cluster can hold {held} ({have}); {remedy}{wait}"
    )


def _find_obstacle(
    alive: Sequence[Mapping[str, Any]], needs: WorkerNeeds, scale: ScaleConfig
) -> tuple[str, str]:
    """Return the field that the nodes do not meet, and what to do."""
    # Fewer workers would not help if a single one does not fit on any node.
    missing = needs.find_missing(alive)
    if missing is not None:
        types = accelerator_types(alive)
        remedies = {
            "use_gpu": "set it to false, add nodes with GPUs",
            "accelerator_type": f"use one of {', '.join(types)}, add nodes with it"
            if types
            else "no node has a type of GPU; set it to null, add nodes with it",
            "label_selector": "use labels that nodes have, add nodes with these",
        }
        return f"scale.{missing}", remedies.get(missing, "lower it, add larger nodes")
    if needs.is_alone and needs.shared().count(alive) >= scale.min_workers:
        return "scale.placement", "set it to spread, add nodes"
    field = "scale.num_workers.min" if scale.elastic_range else "scale.num_workers"
    return field, "lower it, add nodes"
