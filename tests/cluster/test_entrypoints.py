"""What the manifests run, run for real: on nodes of this machine, started with their parameters.

What KubeRay mounts is a folder here, and paths below it are replaced; a tiny model and text are
where the configs look for theirs, and sizes are small. Everything else is the manifest's.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import yaml

from benchmarks.harness.nodes import LocalNodes
from raytune_llama.config.settings import load
from raytune_llama.config.yaml12 import parse_mapping
from raytune_llama.serve.http.keys import append_hash, make_key
from raytune_llama.serve.proxy import find_free_ports
from raytune_llama.storage.place import Place
from raytune_llama.train.config import PretrainConfig
from raytune_llama.tune.config import SweepConfig
from tests.cluster.manifests import ROOT, Cluster, Node, read_cluster
from tests.pipeline.conftest import job_inputs, losses
from tests.serve.conftest import served_dir

__all__ = ["job_inputs", "served_dir"]

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY: dict[str, Any] = {
    "batch": {"sequence_tokens": 24, "sequences_per_step": 4, "micro_batch_sequences": 2},
    "engine": {"precision": "fp32"},
    "scale": {"use_gpu": False, "cpus_per_worker": 1},
    "checkpoint": {"every_steps": 1000},
    "eval": {"every_steps": 1000, "max_sequences": 8},
    "logging": {"every_steps": 1, "tensorboard": False},
}
PROXY_PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
WAIT_SECONDS = 400


class Deployment:
    """A manifest's cluster on this machine."""

    def __init__(self, file: str, folder: Path) -> None:
        self.cluster: Cluster = read_cluster(file)
        self.folder = folder
        self.nodes = LocalNodes()
        self.agents: list[int] = []
        """Ports of the agents of the nodes that were started."""
        self._ports = find_free_ports(len(PROXY_PORTS))
        self._programs = folder / "bin"
        self._programs.mkdir()
        # As the Dockerfile copies them.
        for name, target in (("run_job.sh", "run-job"), ("stop_jobs.py", "stop-jobs")):
            (self._programs / target).symlink_to(ROOT / "cluster" / "docker" / name)

    def place(self, text: str) -> str:
        """Return a text with the folders that pods mount replaced by this machine's."""
        for path in self.cluster.head.volumes:
            if path != "/dev/shm":  # noqa: S108
                text = text.replace(f"{path}/", f"{self.folder}{path}/")
        return text

    def start(self, *, workers: int, cpus: int = 1) -> None:
        """Start the head, and some nodes of the last group."""
        started = [self.cluster.head, *[self.cluster.nodes[-1]] * workers]
        self.agents = find_free_ports(len(started))
        for node, port in zip(started, self.agents, strict=True):
            variables = self.variables(node)
            # Its usual port is one node's only on a machine.
            variables["RAYTUNE_CLUSTER_ARGS"] += f" --dashboard-agent-listen-port={port}"
            self.nodes.run(
                *(("up", "0") if node.is_head else ("add", str(cpus))), variables=variables
            )

    def variables(self, node: Node) -> dict[str, str]:
        """Return the environment in which a node is started, with its `rayStartParams`."""
        variables = {
            "PATH": os.pathsep.join(
                [str(self._programs), str(Path(sys.executable).parent), os.environ["PATH"]]
            ),
            "RAYTUNE_JOBS_DIR": str(self.folder / "jobs"),
            **node.environment,
            "RAYTUNE_CLUSTER_ARGS": " ".join(
                f"--{name}={value}" for name, value in node.start_params.items()
            ),
        }
        command = node.container.get("command")
        if command is None:
            return variables
        # KubeRay puts `&& ulimit ...; ray start ...` behind it.
        shown = subprocess.run(
            ["/bin/bash", "-c", "--", f"{' '.join(command)} && env -0"],
            # Without the tests' own endpoint.
            env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | variables,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        after = dict(pair.split("=", 1) for pair in shown.split("\0") if pair)
        # Other endpoints of this machine have the usual ports.
        ports = dict(zip(PROXY_PORTS, map(str, self._ports), strict=True))
        return variables | {k: v for k, v in after.items() if k.startswith("RAY")} | ports

    def run(self, *command: str, status: int | None = 0) -> str:
        """Run a command in the environment of the head's container; return its output."""
        environment = {**self.nodes.environment, **self.variables(self.cluster.head)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert status is None or done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, name: str, *entrypoint: str) -> None:
        """Submit a job."""
        self.run("ray", "job", "submit", "--no-wait", "--submission-id", name, "--", *entrypoint)

    def status(self, name: str) -> str:
        """Return the status of a job."""
        shown = self.run("ray", "job", "status", name)
        found = re.search(rf"Job '{name}' (?:was )?(succeeded|failed|stopped)", shown)
        return found[1].upper() if found else "RUNNING"

    def wait_for_end(self, name: str) -> str:
        """Return how a job has ended."""
        wait_until(lambda: self.status(name) in ENDED, pause=2)
        return self.status(name)

    def driver(self) -> psutil.Process:
        """Return the process that `run-job` runs now."""
        (file,) = (self.folder / "jobs").glob("*.job")
        (driver,) = psutil.Process(int(file.stem)).children()
        return driver


def wait_until(condition: Callable[[], bool], pause: float = 0.1) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(pause)


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Callable[[str], Deployment]]:
    made: list[Deployment] = []

    def make(file: str) -> Deployment:
        made.append(Deployment(file, tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.nodes.close()


def write_configs(deployment: Deployment, tiny: dict[str, Any]) -> Path:
    """Write the files of the ConfigMap with small sizes; return the entrypoint's."""
    for name, text in deployment.cluster.configs.items():
        # Not with PyYAML, to which 2e-4 is a string.
        config, problems = parse_mapping(deployment.place(text), name)
        assert config is not None, problems
        if "model" in config:
            for section, fields in tiny.items():
                config[section] = (
                    {**config.get(section, {}), **fields} if isinstance(fields, dict) else fields
                )
        path = Path(deployment.place(f"/etc/raytune/{name}"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config), encoding="utf-8")
    return Path(deployment.place(deployment.cluster.entrypoint[3]))


def entrypoint(deployment: Deployment, *overrides: str) -> list[str]:
    return [*(deployment.place(word) for word in deployment.cluster.entrypoint), *overrides]


def test_pretraining_job_continues_by_itself_and_is_stopped_so_that_it_can_continue(
    deploy: Callable[[str], Deployment], job_inputs: Path
) -> None:
    deployment = deploy("rayjob-pretrain.yaml")
    data = Path(deployment.place("/data/"))
    shutil.copytree(job_inputs / "model", data / "models" / "base")
    shutil.copytree(job_inputs / "corpus", data / "corpus")
    file = write_configs(deployment, {**TINY, "max_steps": 200})
    deployment.start(workers=2)

    # Nodes were drained, or somebody has sent SIGTERM: it saves, and starts itself again.
    run = load(PretrainConfig, [str(file)])
    deployment.submit("first", *entrypoint(deployment))
    wait_until(lambda: max(losses(run), default=0) >= 3)
    deployment.driver().send_signal(signal.SIGTERM)
    assert deployment.wait_for_end("first") == "SUCCEEDED"
    assert sorted(losses(run)) == list(range(1, 201))
    assert deployment.run("ray", "job", "logs", "first").count("run-job: stopped after saving") == 1

    # The head's pod is deleted: what runs saves and has failed for KubeRay, which starts it again.
    others = [f"run_dir={data}/runs/other", "max_steps=5000"]
    other = load(PretrainConfig, [str(file), *others])
    deployment.submit("sleep", "sleep", "1000")
    deployment.submit("second", *entrypoint(deployment, *others))
    wait_until(lambda: max(losses(other), default=0) >= 3)
    hook = deployment.cluster.head.container["lifecycle"]["preStop"]["exec"]["command"]
    deployment.run(*hook)
    assert (deployment.status("second"), deployment.status("sleep")) == ("FAILED", "STOPPED")
    (saved,) = Place.local(Path(other.run_dir) / "checkpoints").folders()
    assert int(saved.name.removeprefix("step-")) == max(losses(other)) < 5000

    # On the new head, the same command.
    (deployment.folder / "jobs" / "stopping").unlink()
    stopped = max(losses(other))
    deployment.submit("third", *entrypoint(deployment, *others))
    wait_until(lambda: max(losses(other)) > stopped)
    assert sorted(losses(other))[: int(stopped) + 1] == list(range(1, int(stopped) + 2))


def test_sweep_continues_by_itself(deploy: Callable[[str], Deployment], job_inputs: Path) -> None:
    deployment = deploy("rayjob-sweep.yaml")
    data = Path(deployment.place("/data/"))
    shutil.copytree(job_inputs / "model", data / "models" / "base")
    (data / "instructions").mkdir()
    rows = [{"instruction": f"say {n}", "input": "", "output": "the store"} for n in range(60)]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (data / "instructions" / "rows.jsonl").write_text(text, encoding="utf-8")
    tiny = {**TINY, "batch": {**TINY["batch"], "sequence_tokens": 64}}
    tiny["eval"] = {**TINY["eval"], "every_steps": 10}
    tiny["data"] = {"chat": {"template": "belle"}}
    file = write_configs(deployment, tiny)
    deployment.start(workers=2)

    small = ["num_trials=2", "max_steps=40"]
    sweep = load(SweepConfig, [str(file), *small])
    deployment.submit("sweep", *entrypoint(deployment, *small))
    wait_until(lambda: bool(list(Path(sweep.sweep_dir).glob("trials/*/metrics.jsonl"))))
    deployment.driver().send_signal(signal.SIGTERM)
    assert deployment.wait_for_end("sweep") == "SUCCEEDED"
    assert deployment.run("ray", "job", "logs", "sweep").count("run-job: stopped after saving") == 1
    assert (Path(sweep.sweep_dir) / "best.yaml").exists()


def test_shared_cluster_runs_what_is_submitted(deploy: Callable[[str], Deployment]) -> None:
    deployment = deploy("raycluster.yaml")
    deployment.start(workers=1)
    # The kubelet's probes, which know no token.
    probe = deployment.cluster.head.container["livenessProbe"]["httpGet"]
    for port in deployment.agents:
        assert httpx2.get(f"http://127.0.0.1:{port}{probe['path']}", timeout=30).status_code == 200
    deployment.submit("version", "run-job", "raytune", "--version")
    assert deployment.wait_for_end("version") == "SUCCEEDED"


def test_endpoint_answers_with_a_key_only(
    deploy: Callable[[str], Deployment], served_dir: Path
) -> None:
    deployment = deploy("rayservice.yaml")
    shutil.copytree(served_dir, Path(deployment.place("/data/models/merged")))
    keys = Path(deployment.place("/etc/raytune-keys/hashes"))
    keys.parent.mkdir(parents=True)
    key, line = make_key()
    append_hash(keys, line, "test")

    config = yaml.safe_load(deployment.place(deployment.cluster.owner["spec"]["serveConfigV2"]))
    # On one machine only one proxy can have the port.
    (port,) = find_free_ports(1)
    config |= {"proxy_location": "HeadOnly"}
    config["http_options"]["port"] = port
    arguments = config["applications"][0]["args"]
    arguments["models"][0]["template"] = "belle"
    arguments["replicas"] |= {"cpus": 1, "use_gpu": False}
    file = deployment.folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")

    deployment.start(workers=2)
    address = deployment.nodes.environment["RAY_API_SERVER_ADDRESS"]
    deployment.run("raytune", "serve", str(file), f"address={address}")
    url = f"http://127.0.0.1:{port}"

    allowed = {"Authorization": f"Bearer {key}"}

    def is_ready() -> bool:
        try:
            return httpx2.get(f"{url}/v1/models", headers=allowed, timeout=5).status_code == 200
        except httpx2.HTTPError:
            return False

    wait_until(is_ready, pause=1)
    asked = {"model": "merged", "prompt": "the quick", "max_tokens": 3}
    without = httpx2.post(f"{url}/v1/completions", json=asked, timeout=60)
    assert without.status_code == 401
    answer = httpx2.post(f"{url}/v1/completions", json=asked, headers=allowed, timeout=60)
    assert answer.status_code == 200
