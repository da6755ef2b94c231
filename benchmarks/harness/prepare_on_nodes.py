"""Build a token store on a Ray cluster of several nodes on this machine; say how long it took.

    prepare_on_nodes.py NUM_NODES CPUS_PER_NODE CONFIG.yaml

The last line printed is JSON: seconds without the cluster's start, and the peak resident memory of
each encoding process in MiB, as the kernel counts it.
"""

import json
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from raytune_llama.config.settings import load
from raytune_llama.data.build.preparation import open_data, prepare_data
from raytune_llama.data.config import PrepareDataConfig

OBJECT_STORE_BYTES = 80 * 2**20
POLL_SECONDS = 0.2


class PeakMemory(threading.Thread):
    """Watches the encoding processes of this machine until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[int, float] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        """Read every process's peak, over and over: an ended one has none."""
        while not self._ended.wait(POLL_SECONDS):
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if b"EncodingActor" in (folder / "cmdline").read_bytes():
                        self.peaks[int(folder.name)] = _peak_mib(folder)
                except (FileNotFoundError, ProcessLookupError, StopIteration):
                    continue  # it has ended meanwhile

    def stop(self) -> None:
        """End the watch."""
        self._ended.set()
        self.join()


def _peak_mib(folder: Path) -> float:
    lines = (folder / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    """Start the nodes, build the store, stop the nodes."""
    num_nodes, cpus_per_node = int(sys.argv[1]), int(sys.argv[2])
    config = load(PrepareDataConfig, sys.argv[3:])
    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    watch = PeakMemory()
    try:
        for number in range(num_nodes):
            cluster.add_node(
                node_ip_address=f"127.0.0.{number + 2}",
                num_cpus=cpus_per_node,
                object_store_memory=OBJECT_STORE_BYTES,
            )
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        watch.start()
        start = time.perf_counter()
        prepare_data(config.data, open_data(config.data, Path(config.tokenizer)))
        seconds = time.perf_counter() - start
        watch.stop()
    finally:
        ray.shutdown()
        cluster.shutdown()
    sys.stdout.write(json.dumps({"seconds": seconds, "peaks": list(watch.peaks.values())}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
