"""Our endpoint on a Ray cluster of this machine, and what each of its processes takes."""

import os
import socket
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raytune_llama.connection import connect_to_ray
from raytune_llama.serve.app import build_app
from raytune_llama.serve.config import ReplicaConfig, ServeConfig, ServedModelConfig

MODEL_NAME = "bench"
DEMO_MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"
_TICKS = os.sysconf("SC_CLK_TCK")


def serve_config(model: Path, *, cpus: int, slots: int, waiting: int) -> ServeConfig:
    """Return the config of one replica of a model in fp32."""
    return ServeConfig(
        models=(ServedModelConfig(path=str(model), name=MODEL_NAME, precision="fp32"),),
        replicas=ReplicaConfig(cpus=cpus, slots=slots, waiting=waiting),
    )


@contextmanager
def serve_endpoint(config: ServeConfig) -> Iterator[str]:
    """Serve on loopback; yield the base URL, and stop the endpoint and the cluster at the end."""
    from ray import serve

    port = free_port()
    with connect_to_ray():
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        try:
            serve.run(build_app(config), name="bench")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            serve.shutdown()


def free_port() -> int:
    """Return a port of loopback that nobody uses now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def cpu_seconds() -> dict[str, float]:
    """Return what this process and those below it have computed, in CPU seconds by their parts.

    A process that has ended is not counted.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            # The name before the last bracket may hold blanks.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # It has just ended.
        pid = int(folder.name)
        parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    own = os.getpid()
    seconds: dict[str, float] = defaultdict(float)
    for pid, count in ticks.items():
        ancestor = pid
        while ancestor not in {own, 0}:
            ancestor = parents.get(ancestor, 0)
        if ancestor == own:
            part = "client" if pid == own else _part(pid)
            seconds[part] += count / _TICKS
    return dict(seconds)


def _part(pid: int) -> str:
    """Return which part of the endpoint a process is."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return "others"
    parts = {f":model-{MODEL_NAME}": "replica", ":gateway": "gateway", "ProxyActor": "proxy"}
    return next((part for sign, part in parts.items() if sign in command), "others")
