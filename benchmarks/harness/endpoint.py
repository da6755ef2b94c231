"""Our endpoint on a Ray cluster of this machine."""

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from raytune_llama.serve.config import ProxyChoice, ReplicaConfig, ServeConfig, ServedModelConfig
from raytune_llama.serve.proxy import choose_proxy, find_free_ports, proxy_environment

MODEL_NAME = "bench"
OTHER_NAME = "other"
"""Name of the second model, which gets no requests."""

DEMO_MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"


def serve_config(
    model: Path,
    *,
    cpus: int,
    slots: int,
    waiting: int,
    num_models: int = 1,
    engine: Literal["transformers", "vllm"] = "transformers",
) -> ServeConfig:
    """Return the config of one or two models in fp32 from the same directory, a replica each."""
    names = (MODEL_NAME, OTHER_NAME)[:num_models]
    return ServeConfig(
        models=tuple(
            ServedModelConfig(path=str(model), name=name, precision="fp32") for name in names
        ),
        replicas=ReplicaConfig(cpus=cpus, slots=slots, waiting=waiting, engine=engine),
    )


@contextmanager
def serve_endpoint(config: ServeConfig, *, proxy: ProxyChoice = "haproxy") -> Iterator[str]:
    """Serve on loopback; yield the base URL, and stop the endpoint and the cluster at the end.

    Raises:
        RuntimeError: Ray Serve was imported before; it reads the choice of its proxy only then.
        ConfigError: HAProxy is not installed.
    """
    import ray

    from raytune_llama.connection import quoted_python

    if "ray.serve" in sys.modules:
        raise RuntimeError("an endpoint needs a process that has not imported Ray Serve")
    port = find_free_ports(1)[0]
    num_cpus = int(config.replicas.cpus) * len(config.models)
    # Not below TMPDIR, which may be too long for the path of a Unix socket.
    with tempfile.TemporaryDirectory(prefix="raytune-bench-", dir="/tmp") as folder:
        chosen = choose_proxy(proxy, "127.0.0.1")
        os.environ |= proxy_environment(chosen, config.limits, Path(folder), free_ports=True)
        ray.init(
            address="local",
            num_cpus=max(num_cpus, os.cpu_count() or 1),
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={
                **(quoted_python() or {}),
                "worker_process_setup_hook": _make_thread_namer(),
            },
        )
        try:
            from ray import serve

            from raytune_llama.serve.app import build_apps

            serve.start(http_options={"host": "127.0.0.1", "port": port})
            try:
                for one in build_apps(config):
                    serve.run(one.app, name=one.name, route_prefix=one.route_prefix)
                yield f"http://127.0.0.1:{port}/v1"
            finally:
                serve.shutdown()
        finally:
            ray.shutdown()


def _make_thread_namer() -> Callable[[], None]:
    """Return a function that has threads bear their Python names in /proc as well.

    Python does this itself from 3.14 on. A thread that a named one starts in C inherits the name,
    as OpenMP's workers do: all threads that compute for the engine are called `engine`.
    """

    # A local function is sent to the processes by value: they need not find this module.
    def name_threads() -> None:
        import threading
        from pathlib import Path

        start = threading.Thread.start

        def start_named(self: threading.Thread, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            start(self, *args, **kwargs)
            try:
                name = Path(f"/proc/self/task/{self.native_id}/comm")
                name.write_text(self.name[:15])
            except OSError:
                pass  # It has already ended.

        threading.Thread.start = start_named

    return name_threads
