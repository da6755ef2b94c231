"""A Ray cluster of several nodes on this machine, whose nodes can be lost: `cluster/local.sh`."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 400
"""For one call of the script: a node of a busy machine may need its three attempts."""


class LocalNodes:
    """A head without CPUs and nodes of one CPU each, apart from every other cluster."""

    def __init__(self) -> None:
        # Not below a test's folder: the path of a socket has room for some hundred characters.
        self._folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "RAYTUNE_CLUSTER_DIR": str(self._folder / "c"),
            "RAYTUNE_CLUSTER_NET": f"127.0.{100 + os.getpid() % 100}",
            "RAYTUNE_CLUSTER_PORT": str(_free_port()),
            "RAYTUNE_CLUSTER_DASHBOARD_PORT": str(_free_port()),
        }

    def run(
        self, *arguments: str, status: int = 0, variables: Mapping[str, str] | None = None
    ) -> str:
        """Call the script from another folder; return what it printed.

        `variables` are added to its environment, which is that of the nodes that it starts.

        Raises:
            RuntimeError: its exit status is another one.
        """
        done = subprocess.run(
            [str(REPOSITORY / "cluster" / "local.sh"), *arguments],
            cwd="/",
            env={**self._environment, **(variables or {})},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        output = done.stdout + done.stderr
        if done.returncode != status:
            raise RuntimeError(f"local.sh {arguments}: status {done.returncode}\n{output}")
        return output

    @cached_property
    def environment(self) -> dict[str, str]:
        """The environment of a job on the cluster, made of the lines that the script prints."""
        lines = [line for line in self.run("status").splitlines() if line.startswith("export ")]
        pairs = [pair.split("=", 1) for line in lines for pair in line.split()[1:]]
        return {**self._environment, **dict(pairs)}

    def pids(self) -> dict[str, int]:
        """Return the process of each node by the node's name."""
        files = (self._folder / "c").glob("*/pid")
        return {file.parent.name: int(file.read_text()) for file in files}

    def resize(self, count: int) -> None:
        """Lose nodes or start some, until there are so many beside the head."""
        numbers = [name.removeprefix("node-") for name in self.pids() if name != "head"]
        for number in numbers[count:]:
            self.run("kill", number)
        for _ in range(count - len(numbers)):
            self.run("add")

    def training(self) -> dict[str, list[int]]:
        """Return the processes that train, by the number of the node that they run on."""
        found = {
            name.removeprefix("node-"): [
                process.pid for process in _below(pid) if "RayTrainWorker" in process.name()
            ]
            for name, pid in self.pids().items()
        }
        return {number: pids for number, pids in found.items() if pids}

    def kill_worker(self, number: str) -> None:
        """Kill a process that trains on a node, and leave the node alive."""
        os.kill(self.training()[number][0], signal.SIGKILL)

    def close(self) -> None:
        """Stop what is left of the cluster."""
        if (self._folder / "c").exists():
            self.run("down")
        shutil.rmtree(self._folder)


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
