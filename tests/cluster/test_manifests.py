"""The manifests of cluster/kuberay fit together, and what they name exists.

Their form is held against KubeRay's and Kubernetes' schemas by hand: those are not in this
repository.
"""

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray._private import utils as ray_utils
from ray.serve.schema import HTTPOptionsSchema, ServeDeploySchema

import raytune_llama
from raytune_llama.cli import config_classes
from raytune_llama.config.settings import load
from raytune_llama.serve.config import ServeConfig, read_arguments
from raytune_llama.tune.config import SweepConfig, load_base
from tests.cluster.manifests import (
    CLUSTERS,
    FILES,
    ROOT,
    Cluster,
    Node,
    documents,
    matches,
    of_kind,
    read_cluster,
)

JOBS = tuple(file for file in CLUSTERS if file.startswith("rayjob"))
SECRET_NAME = re.compile(r"TOKEN|PASSWORD|SECRET|KEY|CREDENTIAL", re.IGNORECASE)
SHELL_CHARACTERS = re.compile(r"[^\w./=@%+:, -]")


@pytest.fixture(params=CLUSTERS)
def cluster(request: pytest.FixtureRequest) -> Cluster:
    return read_cluster(request.param)


def service_config() -> dict[str, Any]:
    (service,) = of_kind("rayservice.yaml", "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def service_arguments() -> ServeConfig:
    (application,) = service_config()["applications"]
    return read_arguments(application["args"])


def test_images_have_the_version_of_the_package(cluster: Cluster) -> None:
    targets = {f"raytune-llama:{raytune_llama.__version__}-{kind}" for kind in ("cpu", "cuda")}
    images = {container["image"] for _, pod in cluster.pods for container in pod["containers"]}
    assert images <= targets


def test_groups_with_gpus_have_the_cuda_image_and_find_nodes_with_gpus(cluster: Cluster) -> None:
    for node in cluster.nodes:
        limits = node.container["resources"]["limits"]
        has_gpu = "nvidia.com/gpu" in limits
        assert node.container["image"].endswith("-cuda") == has_gpu
        keys = {toleration["key"] for toleration in node.pod.get("tolerations", [])}
        assert ("nvidia.com/gpu" in keys) == has_gpu
        assert any("gpu" in name for name in node.pod.get("nodeSelector", {})) == has_gpu


def test_ray_version_is_the_installed_one(cluster: Cluster) -> None:
    assert cluster.spec["rayVersion"] == ray.__version__


@functools.cache
def literals(folder: Path) -> frozenset[str]:
    """Return all names that stand alone in quotes in a folder's modules."""
    quoted = re.compile(r"""(["'])(RAY\w+)\1""")
    texts = (path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    return frozenset(name for text in texts for _, name in quoted.findall(text))


def test_variables_are_read_by_ray_or_by_the_package(cluster: Cluster) -> None:
    known = literals(Path(ray.__file__).parent) | literals(ROOT / "raytune_llama")
    for node in cluster.nodes:
        assert set(node.environment) <= known


@pytest.mark.parametrize("file", FILES)
def test_no_secret_has_a_value_in_a_manifest(file: str) -> None:
    assert not of_kind(file, "Secret")
    for part in mappings(documents(file)):
        name, value = part.get("name"), part.get("value")
        assert not (isinstance(name, str) and SECRET_NAME.search(name) and value)


def mappings(part: object) -> Iterator[dict[str, Any]]:
    """Yield all mappings of a document."""
    if isinstance(part, dict):
        yield part
        part = list(part.values())
    if isinstance(part, list):
        for item in part:
            yield from mappings(item)


def test_ray_wants_the_token_of_a_secret(cluster: Cluster) -> None:
    options = cluster.spec["authOptions"]
    assert options["mode"] == "token"
    assert options["secretName"]


def test_pods_meet_the_restricted_security_standard(cluster: Cluster) -> None:
    (namespace,) = of_kind("namespace.yaml", "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for _, pod in cluster.pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
    if cluster.spec.get("enableInTreeAutoscaling"):
        context = cluster.spec["autoscalerOptions"]["securityContext"]
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_cluster_that_grows_uses_the_second_autoscaler(cluster: Cluster) -> None:
    grows = any(node.spec["minReplicas"] < node.spec["maxReplicas"] for node in cluster.nodes[1:])
    assert bool(cluster.spec.get("enableInTreeAutoscaling")) == grows
    assert not grows or cluster.spec["autoscalerOptions"]["version"] == "v2"


def test_selectors_of_the_file_select_its_own_pods_only(cluster: Cluster) -> None:
    others = [
        labels for file in CLUSTERS if file != cluster.file for labels, _ in read_cluster(file).pods
    ]
    for document in of_kind(cluster.file, "PodDisruptionBudget", "NetworkPolicy"):
        selector = document["spec"].get("selector") or document["spec"]["podSelector"]
        assert any(matches(selector, labels) for labels, _ in cluster.pods)
        assert not any(matches(selector, labels) for labels in others)


def test_shared_policies_select_heads_nodes_and_submitters(cluster: Cluster) -> None:
    policies = {
        one["metadata"]["name"]: one["spec"] for one in of_kind("namespace.yaml", "NetworkPolicy")
    }
    dashboard, metrics = policies["raytune-dashboard"], policies["raytune-metrics"]
    assert matches(dashboard["podSelector"], cluster.head.labels)
    assert all(matches(metrics["podSelector"], node.labels) for node in cluster.nodes)
    assert not any(matches(dashboard["podSelector"], node.labels) for node in cluster.nodes[1:])
    if cluster.file in JOBS:
        (labels, _) = cluster.pods[-1]
        callers = [
            peer["podSelector"]
            for peer in dashboard["ingress"][0]["from"]
            if "namespaceSelector" not in peer
        ]
        assert any(matches(selector, labels) for selector in callers)
        # Not a node of the cluster: it reaches the dashboard and nothing else.
        (own,) = of_kind(cluster.file, "NetworkPolicy")
        assert not matches(own["spec"]["ingress"][0]["from"][0]["podSelector"], labels)


def test_every_head_and_every_replica_has_a_disruption_budget(cluster: Cluster) -> None:
    budgets = [one["spec"]["selector"] for one in of_kind(cluster.file, "PodDisruptionBudget")]
    wanted = cluster.nodes if cluster.file == "rayservice.yaml" else cluster.nodes[:1]
    for node in wanted:
        assert any(matches(selector, node.labels) for selector in budgets)


def test_prometheus_reads_ports_that_the_nodes_have(cluster: Cluster) -> None:
    (monitor,) = of_kind("monitoring.yaml", "PodMonitor")
    ports = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
    assert all(matches(monitor["spec"]["selector"], node.labels) for node in cluster.nodes)
    assert {"metrics"} <= {port["name"] for port in cluster.nodes[-1].container["ports"]}
    assert set(ports) <= {port["name"] for port in cluster.head.container["ports"]}


def test_claims_and_maps_that_a_cluster_mounts_exist(cluster: Cluster) -> None:
    claims = {
        one["metadata"]["name"] for one in of_kind("storage-disk.yaml", "PersistentVolumeClaim")
    }
    maps = {one["metadata"]["name"] for one in of_kind(cluster.file, "ConfigMap")}
    for node in cluster.nodes:
        for volume in node.volumes.values():
            claim, config = volume.get("persistentVolumeClaim"), volume.get("configMap")
            assert claim is None or claim["claimName"] in claims
            assert config is None or config["name"] in maps
        assert node.volumes["/dev/shm"]["emptyDir"]["medium"] == "Memory"  # noqa: S108


def num_bytes(text: str) -> int:
    return int(text.removesuffix("Gi")) * 2**30


def test_object_store_fits_into_shared_memory(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in cluster.nodes:
        shared = num_bytes(node.volumes["/dev/shm"]["emptyDir"]["sizeLimit"])  # noqa: S108
        memory = num_bytes(node.container["resources"]["limits"]["memory"])
        monkeypatch.setattr(ray_utils, "get_shared_memory_bytes", lambda shared=shared: shared)
        # If it does not fit, `ray start` puts the store into files in /tmp/ray.
        assert ray_utils.resolve_object_store_memory(memory) <= shared, node.group


def seconds(node: Node, variable: str) -> int:
    return int(node.environment[variable])


@pytest.mark.parametrize("file", [*JOBS, "raycluster.yaml"])
def test_head_has_the_time_to_stop_its_jobs(file: str) -> None:
    head = read_cluster(file).head
    hook = head.container["lifecycle"]["preStop"]["exec"]["command"]
    assert hook[0] == "stop-jobs"
    drain = seconds(head, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    assert seconds(head, "RAY_JOB_STOP_WAIT_TIME_S") < int(hook[1])
    assert int(hook[1]) + drain < head.pod["terminationGracePeriodSeconds"]


def test_worker_is_drained_before_its_pod_is_killed(cluster: Cluster) -> None:
    for node in cluster.nodes:
        drain = seconds(node, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
        assert drain < node.pod["terminationGracePeriodSeconds"]


def test_requests_of_the_endpoint_end_before_what_they_run_on_does() -> None:
    cluster, config = read_cluster("rayservice.yaml"), service_arguments()
    longest = config.limits.request_seconds
    assert config.replicas.drain_seconds >= longest
    assert cluster.owner["spec"]["rayClusterDeletionDelaySeconds"] > longest
    assert seconds(cluster.nodes[-1], "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") > longest


@pytest.mark.parametrize("file", JOBS)
def test_entrypoint_is_the_same_in_any_shell(file: str) -> None:
    # KubeRay puts it into a command line of the submitter's shell, and Ray into one of the head's.
    text = read_cluster(file).owner["spec"]["entrypoint"]
    assert shlex.join(shlex.split(text)) == text
    assert not SHELL_CHARACTERS.search(text)


@pytest.mark.parametrize("file", JOBS)
def test_config_of_the_entrypoint_is_mounted_and_accepted(file: str, tmp_path: Path) -> None:
    cluster = read_cluster(file)
    runner, program, verb, path, *overrides = cluster.entrypoint
    assert (runner, program) == ("run-job", "raytune")
    folder = str(Path(path).parent)
    assert "configMap" in cluster.head.volumes[folder]
    for name, text in cluster.configs.items():
        (tmp_path / name).write_text(text.replace(folder, str(tmp_path)), encoding="utf-8")
    config = load(config_classes()[verb], [str(tmp_path / Path(path).name), *overrides])
    run = load_base(config) if isinstance(config, SweepConfig) else config
    # Its workers fit into the group.
    (group,) = cluster.nodes[1:]
    limits = group.container["resources"]["limits"]
    assert run.scale.cpus_per_worker <= int(limits["cpu"])
    assert run.scale.use_gpu == ("nvidia.com/gpu" in limits)
    assert run.scale.max_workers <= group.spec["replicas"] * int(limits.get("nvidia.com/gpu", 1))


def test_endpoint_is_a_config_of_ray_serve_and_of_the_package() -> None:
    config = service_config()
    ServeDeploySchema.model_validate(config)
    # Which ignores options that it does not know.
    assert set(config["http_options"]) <= set(HTTPOptionsSchema.model_fields)
    cluster, arguments = read_cluster("rayservice.yaml"), service_arguments()
    limits = cluster.nodes[-1].container["resources"]["limits"]
    assert arguments.replicas.use_gpu == ("nvidia.com/gpu" in limits)
    assert arguments.replicas.cpus <= int(limits["cpu"])
    # The keys are on every node, and without them nothing is served beyond loopback.
    assert arguments.keys_file is not None
    for node in cluster.nodes:
        assert "secret" in node.volumes[str(Path(arguments.keys_file).parent)]
    port = config["http_options"]["port"]
    assert cluster.nodes[-1].container["readinessProbe"]["httpGet"]["port"] == port
    assert arguments.replicas.min <= cluster.nodes[-1].spec["minReplicas"]
    assert arguments.replicas.max <= cluster.nodes[-1].spec["maxReplicas"]
