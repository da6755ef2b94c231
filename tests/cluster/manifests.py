"""What the manifests of cluster/kuberay say, as the tests read it."""

import functools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
FILES = tuple(sorted(path.name for path in KUBERAY.glob("*.yaml")))
CLUSTERS = ("raycluster.yaml", "rayjob-pretrain.yaml", "rayjob-sweep.yaml", "rayservice.yaml")
"""The files with a cluster each."""


@functools.cache
def documents(file: str) -> list[dict[str, Any]]:
    """Return the documents of a manifest."""
    text = (KUBERAY / file).read_text(encoding="utf-8")
    return [document for document in yaml.safe_load_all(text) if document]


def of_kind(file: str, *kinds: str) -> list[dict[str, Any]]:
    """Return the documents of some kinds."""
    return [document for document in documents(file) if document["kind"] in kinds]


@dataclass(frozen=True)
class Node:
    """The head of a cluster, or one group of its workers."""

    group: str
    """Name of the group; `headgroup` for the head."""

    labels: dict[str, str]
    """Labels of its pods, those that KubeRay adds included."""

    pod: dict[str, Any]
    """Specification of its pods."""

    start_params: dict[str, str]
    """Arguments of `ray start`."""

    spec: dict[str, Any]
    """The head's or the group's own fields."""

    @property
    def is_head(self) -> bool:
        """Whether it is the head."""
        return self.group == "headgroup"

    @property
    def container(self) -> dict[str, Any]:
        """The container that Ray runs in; KubeRay takes the first."""
        return self.pod["containers"][0]

    @property
    def environment(self) -> dict[str, str]:
        """The variables whose values are in the manifest."""
        return {item["name"]: item["value"] for item in self.container["env"]}

    @property
    def volumes(self) -> dict[str, dict[str, Any]]:
        """Its volumes by the path where they are mounted."""
        named = {volume["name"]: volume for volume in self.pod["volumes"]}
        return {
            mount["mountPath"]: named[mount["name"]] for mount in self.container["volumeMounts"]
        }


@dataclass(frozen=True)
class Cluster:
    """A manifest's cluster, and what runs on it."""

    file: str
    """Name of the manifest."""

    owner: dict[str, Any]
    """The RayCluster, RayJob or RayService."""

    spec: dict[str, Any]
    """Specification of the RayCluster."""

    nodes: tuple[Node, ...]
    """Head and groups."""

    @property
    def head(self) -> Node:
        """The head."""
        return self.nodes[0]

    @property
    def pods(self) -> list[tuple[dict[str, str], dict[str, Any]]]:
        """Labels and specification of all kinds of pods, the submitter's included."""
        found = [(node.labels, node.pod) for node in self.nodes]
        submitter = self.owner["spec"].get("submitterPodTemplate")
        return [
            *found,
            *([(submitter["metadata"]["labels"], submitter["spec"])] if submitter else []),
        ]

    @property
    def entrypoint(self) -> list[str]:
        """Words of a RayJob's entrypoint."""
        return shlex.split(self.owner["spec"]["entrypoint"])

    @property
    def configs(self) -> dict[str, str]:
        """Texts of the files of the ConfigMap that the head mounts, by name."""
        mounted = {
            volume["configMap"]["name"]
            for volume in self.head.volumes.values()
            if "configMap" in volume
        }
        maps = of_kind(self.file, "ConfigMap")
        return {
            name: text
            for one in maps
            if one["metadata"]["name"] in mounted
            for name, text in one["data"].items()
        }


def read_cluster(file: str) -> Cluster:
    """Return the cluster of a manifest."""
    (owner,) = of_kind(file, "RayCluster", "RayJob", "RayService")
    field = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(owner["kind"])
    spec = owner["spec"] if field is None else owner["spec"][field]
    is_service = owner["kind"] == "RayService"
    return Cluster(file, owner, spec, tuple(_nodes(spec, is_service=is_service)))


def _nodes(spec: dict[str, Any], *, is_service: bool) -> Iterator[Node]:
    groups = [("headgroup", spec["headGroupSpec"])]
    groups += [(group["groupName"], group) for group in spec["workerGroupSpecs"]]
    for name, group in groups:
        is_head = name == "headgroup"
        # As KubeRay's labelPod and BuildPod add them.
        added = {
            "ray.io/is-ray-node": "yes",
            "ray.io/node-type": "head" if is_head else "worker",
            "ray.io/group": name,
            **({"ray.io/serve": str(not is_head).lower()} if is_service else {}),
        }
        template = group["template"]
        labels = {**template["metadata"]["labels"], **added}
        yield Node(name, labels, template["spec"], group["rayStartParams"], group)


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector without expressions selects a pod."""
    return selector.get("matchLabels", {}).items() <= labels.items()
