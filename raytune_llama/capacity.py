"""How many workers the nodes of a Ray cluster can hold, counted as Ray's scheduler places them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from raytune_llama.config.node_selection import NodeSelection
from raytune_llama.config.settings import ConfigError

logger = logging.getLogger(__name__)

ACCELERATOR_PREFIX = "accelerator_type:"
"""Prefix of the resource that a node has for its type of GPU; Ray's own."""

ACCELERATOR_SHARE = 0.001
"""Amount of that resource per worker, as Ray itself requests: each node has 1 of it."""

_UNITS = 10_000
"""Ray counts resources in multiples of 1 / 10,000."""

_COUNTED = ("CPU", "GPU")
_BYTES = ("memory", "object_store_memory")


@dataclass(frozen=True)
class WorkerNeeds:
    """What a node must have to hold a worker."""

    resources: Mapping[str, float]
    """Amount of each resource that Ray reserves per worker."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """Conditions for the labels of the node, as `label_selector` gives them."""

    is_alone: bool = False
    """Whether a node holds at most one of the workers."""

    @classmethod
    def of(
        cls,
        nodes: NodeSelection,
        *,
        cpus: float,
        gpus: float,
        others: Mapping[str, float] | None = None,
        is_alone: bool = False,
    ) -> Self:
        """Return what a worker needs.

        Args:
            nodes: nodes that it may run on.
            cpus: CPUs per worker.
            gpus: GPUs per worker, or share of one; 0: none.
            others: amounts of other resources.
            is_alone: whether a node holds at most one of the workers.
        """
        resources = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
        if nodes.accelerator_type is not None:
            resources[f"{ACCELERATOR_PREFIX}{nodes.accelerator_type}"] = ACCELERATOR_SHARE
        return cls({**resources, **(others or {})}, nodes.label_selector, is_alone)

    def count_on(self, node: Mapping[str, Any], free: Mapping[str, float] | None = None) -> int:
        """Return how many workers a node can hold at a time.

        Args:
            node: node as `ray.nodes()` lists it; a dead one holds none.
            free: amount of each resource that is free on the node; None: all that it has.
        """
        if not node["Alive"] or not self.matches(node):
            return 0
        amounts = node["Resources"] if free is None else free
        held = min(
            _num_held(amounts.get(name, 0.0), amount, is_device=name == "GPU")
            for name, amount in self.resources.items()
        )
        return min(held, 1) if self.is_alone else held

    def matches(self, node: Mapping[str, Any]) -> bool:
        """Whether the labels of a node meet the conditions."""
        return matches_labels(node.get("Labels") or {}, self.labels)

    def shared(self) -> Self:
        """Return the same needs of workers that may share a node."""
        return replace(self, is_alone=False)

    def count(self, nodes: Sequence[Mapping[str, Any]]) -> int:
        """Return how many workers the nodes can hold at a time."""
        return sum(self.count_on(node) for node in nodes)

    def count_groups(self, nodes: Sequence[Mapping[str, Any]], num_workers: int) -> int:
        """Return how many groups of `num_workers` the nodes can hold at a time."""
        if not self.is_alone:
            return self.count(nodes) // num_workers
        # Workers of different groups may share a node.
        slots = [self.shared().count_on(node) for node in nodes]
        groups = 0
        while sum(min(groups + 1, own) for own in slots) >= (groups + 1) * num_workers:
            groups += 1
        return groups

    def count_free(
        self, nodes: Sequence[Mapping[str, Any]], free: Mapping[str, Mapping[str, float]]
    ) -> int:
        """Return how many more workers the nodes can hold besides what runs on them.

        Args:
            nodes: nodes as `ray.nodes()` lists them.
            free: amount of each free resource, by the id of the node.
        """
        return sum(self.count_on(node, free.get(node["NodeID"], {})) for node in nodes)

    def find_missing(self, nodes: Sequence[Mapping[str, Any]]) -> str | None:
        """Return the field of `scale` that no node meets, or that all together do not; None: none.

        Args:
            nodes: nodes that are alive.
        """
        if self.count(nodes):
            return None
        for name, amount in self.resources.items():
            if name == "CPU" or any(node["Resources"].get(name, 0.0) >= amount for node in nodes):
                continue
            return _field_of(name)
        if replace(self, labels={}).count(nodes):
            return "label_selector"
        # Nodes have each of them, but none has all: the first without which one would do.
        names = sorted(self.resources, key=lambda name: (name in _COUNTED, not _is_type(name)))
        for name in names:
            rest = {each: amount for each, amount in self.resources.items() if each != name}
            if rest and replace(self, resources=rest).count(nodes):
                return _field_of(name)
        return "cpus_per_worker"

    def describe(self) -> str:
        """Return the resources and labels as text, such as `1 CPU and 1 GPU (H100)`."""
        amounts = {name: value for name, value in self.resources.items() if not _is_type(name)}
        text = " and ".join(_describe_amount(name, amount) for name, amount in amounts.items())
        kinds = [name.removeprefix(ACCELERATOR_PREFIX) for name in self.resources if _is_type(name)]
        kinds += [f"{key}: {condition}" for key, condition in self.labels.items()]
        return f"{text} ({', '.join(kinds)})" if kinds else text

    def describe_node(self, node: Mapping[str, Any]) -> str:
        """Return what a node has of what workers need, such as `10.0.0.1: 8 CPUs, 1 GPUs, L4`."""
        own = node["Resources"]
        others = [name for name in self.resources if name not in _COUNTED and not _is_type(name)]
        parts = [f"{own.get(name, 0):g} {name}s" for name in _COUNTED]
        parts += [_describe_amount(name, own.get(name, 0)) for name in others]
        if any(map(_is_type, self.resources)):
            parts += accelerator_types([node]) or ["no accelerator type"]
        labels = node.get("Labels") or {}
        parts += [f"{key}: {labels.get(key, 'no label')}" for key in self.labels]
        return f"{node['NodeManagerAddress']}: {', '.join(parts)}"


def limit_workers(num_workers: int, needs: WorkerNeeds, nodes: Sequence[Mapping[str, Any]]) -> int:
    """Return how many of the workers the nodes can hold at a time; fewer than wanted are logged.

    Args:
        num_workers: `scale.num_workers`.
        needs: what a worker needs.
        nodes: nodes as `ray.nodes()` lists them.

    Raises:
        ConfigError: the nodes can hold none; names the field that none of them meets.
    """
    held = needs.count(nodes)
    if held == 0:
        alive = [node for node in nodes if node["Alive"]]
        have = "; ".join(map(needs.describe_node, alive)) or "no node is alive"
        raise ConfigError(
            [
                f"scale.{needs.find_missing(alive)}: a worker needs {needs.describe()}, which no "
                f"node of the cluster has ({have}); change it, or add such nodes"
            ]
        )
    if held < num_workers:
        logger.warning(
            "scale.num_workers: the cluster can hold %d workers with %s each, wanted %d: starting "
            "with %d",
            *(held, needs.describe(), num_workers, held),
        )
    return min(held, num_workers)


def accelerator_types(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the types of GPU that the nodes have, sorted."""
    names = {name for node in nodes for name in node["Resources"] if _is_type(name)}
    return sorted(name.removeprefix(ACCELERATOR_PREFIX) for name in names)


def _field_of(name: str) -> str:
    """Return the field of `scale` that requires a resource."""
    if name in _COUNTED:
        return "use_gpu" if name == "GPU" else "cpus_per_worker"
    return "accelerator_type" if _is_type(name) else f"resources_per_worker.{name}"


def _describe_amount(name: str, amount: float) -> str:
    if name in _BYTES:
        return f"{amount / 2**30:g} GiB {name}"
    return f"{amount:g} {name}"


def _is_type(name: str) -> bool:
    return name.startswith(ACCELERATOR_PREFIX)


def _num_held(has: float, amount: float, *, is_device: bool) -> int:
    """Return how often an amount fits; a share of a device must lie on one of them."""
    units, wanted = round(has * _UNITS), round(amount * _UNITS)
    if not is_device or wanted >= _UNITS:
        return units // wanted
    whole, rest = divmod(units, _UNITS)
    return whole * (_UNITS // wanted) + rest // wanted


def matches_labels(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels meet all conditions of a `label_selector`, as Ray decides it.

    A node without the label meets `!a` and `!in(a,b)`.
    """
    return all(_is_met(labels.get(key), condition) for key, condition in selector.items())


def _is_met(value: str | None, condition: str) -> bool:
    is_negated, wanted = condition.startswith("!"), condition.removeprefix("!")
    values = [wanted]
    if wanted.startswith("in("):
        values = wanted.removeprefix("in(").removesuffix(")").split(",")
    return (value in values) is not is_negated
