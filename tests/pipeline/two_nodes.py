"""Run a pre-training config on a Ray cluster of two nodes with one CPU each, on this machine.

With the environment variable NODE_CACHES, each node has caches of its own below that folder.
"""

import os
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from raytune_llama.config.settings import load
from raytune_llama.connection import quoted_python
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.trainer import run_training

OBJECT_STORE_BYTES = 80 * 2**20


def main() -> None:
    """Start the nodes, train, print which nodes had workers, stop the nodes."""
    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for address in ("127.0.0.2", "127.0.0.3"):
        cluster.add_node(
            node_ip_address=address,
            num_cpus=1,
            object_store_memory=OBJECT_STORE_BYTES,
            env_vars=own_caches(address),
        )
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=quoted_python())
    try:
        run = run_training(load(PretrainConfig, sys.argv[1:]))
        # Each node holds one worker of one CPU, so two workers were on two nodes.
        nodes = sorted(n["NodeManagerAddress"] for n in ray.nodes() if n["Resources"].get("CPU"))
        sys.stdout.write(f"{run.status} on nodes {' '.join(nodes)}\n")
    finally:
        ray.shutdown()
        cluster.shutdown()


def own_caches(address: str) -> dict[str, str]:
    """Return the environment of a node with caches of its own, if they are asked for."""
    folder = os.environ.get("NODE_CACHES")
    if folder is None:
        return {}
    return {
        "RAYTUNE_LLAMA_CACHE_DIR": str(Path(folder, address, "cache")),
        "HF_HUB_CACHE": str(Path(folder, address, "hub-cache")),
    }


if __name__ == "__main__":
    main()
