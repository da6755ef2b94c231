"""Train on Ray nodes of one CPU each, one of which is taken away on the way, as a cloud does."""

import sys
import threading
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from raytune_llama.config.settings import load
from raytune_llama.connection import quoted_python
from raytune_llama.logs import setup_logging
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.monitoring.metrics import LOSS, read_metrics
from raytune_llama.train.trainer import run_training

OBJECT_STORE_BYTES = 80 * 2**20
NOTICE_SECONDS = 600
STRIKE_STEP = 60


def main() -> None:
    """Start so many nodes, train, drain a node that trains; print how the run ended."""
    num_nodes, *argv = sys.argv[1:]
    config = load(PretrainConfig, argv)
    setup_logging()
    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for number in range(int(num_nodes)):
        cluster.add_node(
            node_ip_address=f"127.0.0.{number + 2}",
            num_cpus=1,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=quoted_python())

    reasons: Any = autoscaler_pb2

    def drain() -> None:
        while not has_trained(config):
            time.sleep(0.1)
        # One that a worker has taken the CPU of.
        # Ray has no public way to either.
        private: Any = ray._private  # pyright: ignore[reportPrivateImportUsage]
        free = private.state.available_resources_per_node()
        busy = [
            node["NodeID"]
            for node in ray.nodes()
            if node["Resources"].get("CPU") and not free[node["NodeID"]].get("CPU")
        ]
        private.worker.global_worker.gcs_client.drain_node(
            busy[0],
            reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "the spot price rose",
            int((time.time() + NOTICE_SECONDS) * 1000),
        )
        sys.stdout.write("node drained\n")

    threading.Thread(target=drain, daemon=True).start()
    try:
        run = run_training(config)
        sys.stdout.write(f"{run.status} at step {run.step}\n")
    finally:
        ray.shutdown()
        cluster.shutdown()


def has_trained(config: PretrainConfig) -> bool:
    """Whether a run is on its way."""
    return any(r["step"] >= STRIKE_STEP for r in read_metrics(config.run_place) if LOSS in r)


if __name__ == "__main__":
    main()
