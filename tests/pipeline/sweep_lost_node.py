"""Run a sweep on a Ray cluster of two nodes, and kill one of them on the way."""

import sys
import threading
import time

import ray
from ray.cluster_utils import Cluster

from raytune_llama.config.settings import load
from raytune_llama.connection import quoted_python
from raytune_llama.logs import setup_logging
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.journal import Journal
from raytune_llama.tune.sweep import run_sweep

OBJECT_STORE_BYTES = 80 * 2**20


def main() -> None:
    """Start the nodes, sweep, kill a raylet as soon as two trials are on their way."""
    setup_logging()
    sweep = load(SweepConfig, sys.argv[1:])
    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [
        cluster.add_node(
            node_ip_address=address, num_cpus=1, object_store_memory=OBJECT_STORE_BYTES
        )
        for address in ("127.0.0.2", "127.0.0.3")
    ]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=quoted_python())

    def lose_node() -> None:
        while sum(trial.step >= 4 for trial in Journal(sweep.place).trials.values()) < 2:
            time.sleep(0.1)
        cluster.remove_node(nodes[0], allow_graceful=False)
        sys.stdout.write("node lost\n")

    killer = threading.Thread(target=lose_node, daemon=True)
    try:
        killer.start()
        summary = run_sweep(sweep)
        killer.join(timeout=60)
        sys.stdout.write(f"{summary.status}\n")
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
