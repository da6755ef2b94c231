"""Serve a model on a node that has nothing but this package, and print an answer.

    python -m tests.serve.fresh_node MODEL CACHES

The head of the cluster can hold no replica; the other node has its caches below CACHES.
"""

import socket
import sys
from pathlib import Path
from typing import Any

import httpx2
import ray
from ray.cluster_utils import Cluster

from raytune_llama.connection import quoted_python
from raytune_llama.serve.config import ReplicaConfig, ServeConfig, ServedModelConfig

OBJECT_STORE_BYTES = 80 * 2**20


def main(model: str, caches: Path) -> None:
    """Start the nodes, serve, ask, stop the nodes."""
    sizes: dict[str, Any] = {"object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **sizes})
    cluster.add_node(
        node_ip_address="127.0.0.2",
        num_cpus=1,
        env_vars={
            "RAYTUNE_LLAMA_CACHE_DIR": str(caches / "cache"),
            "HF_HUB_CACHE": str(caches / "hub-cache"),
        },
        **sizes,
    )
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=quoted_python())
    from ray import serve

    from raytune_llama.serve.app import build_app

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    try:
        served = ServedModelConfig(path=model, template="belle")
        config = ServeConfig(models=(served,), replicas=ReplicaConfig(cpus=0.5))
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_app(config), name="llm")
        asked = {"model": served.served_name, "prompt": "the quick", "max_tokens": 3}
        url = f"http://127.0.0.1:{port}/v1/completions"
        answer = httpx2.post(url, json=asked, timeout=120)
        sys.stdout.write(f"{answer.status_code} {answer.json()['model']}\n")
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
