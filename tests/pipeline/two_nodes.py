"""Run a pre-training config on a Ray cluster of two nodes with one CPU each, on this machine."""

import sys

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
            node_ip_address=address, num_cpus=1, object_store_memory=OBJECT_STORE_BYTES
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


if __name__ == "__main__":
    main()
