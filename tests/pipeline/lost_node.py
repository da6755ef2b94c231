"""Build a token store on a Ray cluster of two nodes, and kill one of them on the way."""

import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from raytune_llama.config.settings import load
from raytune_llama.connection import quoted_python
from raytune_llama.data.build.preparation import open_data, prepare_data
from raytune_llama.data.config import PrepareDataConfig

OBJECT_STORE_BYTES = 80 * 2**20


def main() -> None:
    """Start the nodes, build the store, kill a raylet as soon as two units are done."""
    config = load(PrepareDataConfig, sys.argv[1:])
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
        parent = Path(config.data.store_dir).parent
        while len(done := list(parent.glob("store.partial-*/units/0000?.json"))) < 2:
            time.sleep(0.02)
        cluster.remove_node(nodes[0], allow_graceful=False)
        sys.stdout.write(f"node lost after {len(done)} units\n")

    killer = threading.Thread(target=lose_node, daemon=True)
    try:
        killer.start()
        prepare_data(config.data, open_data(config.data, Path(config.tokenizer)))
        killer.join(timeout=60)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
