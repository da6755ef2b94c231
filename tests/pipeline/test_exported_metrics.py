"""What a node exports to Prometheus while a run trains on it."""

import threading
import time
import urllib.request

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from raytune_llama.data.build.preparation import prepare_data
from raytune_llama.signals import StopSignal
from raytune_llama.storage.lease import Lease
from raytune_llama.train.monitoring import metrics
from raytune_llama.train.monitoring.metrics import run_label
from raytune_llama.train.orchestration.exported_metrics import EXPORTED, RESTARTS, STALLS
from raytune_llama.train.orchestration.launch import launch
from raytune_llama.train.preflight import open_inputs
from raytune_llama.train.progress import STEP
from raytune_llama.train.trainer import prepare_run
from tests.pipeline.conftest import MakeJob


def exported_values(run: str) -> dict[str, float]:
    """Return the metrics of a run as its node exports them, by name without Ray's prefix."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text = response.read().decode()
    return {
        sample.name.removeprefix("ray_"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("ray_raytune_") and sample.labels["run"] == run
    }


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_node_exports_the_metrics_of_a_run_while_it_trains(make_job: MakeJob) -> None:
    config = make_job(
        max_steps=100_000,
        checkpoint__every_steps=100_000,
        eval__every_steps=None,
        logging__every_steps=1000,
    )
    store = prepare_data(config.encoded_data, open_inputs(config).data)
    stop = StopSignal()
    with Lease(config.run_place) as lease:
        run = prepare_run(config, store, lease.confirm())
        thread = threading.Thread(target=launch, args=(run, stop))
        thread.start()
        wanted = {EXPORTED[name][0] for name in (STEP, metrics.LOSS, metrics.EVAL_LOSS)}
        deadline = time.monotonic() + 240
        found: dict[str, float] = {}
        while not wanted <= found.keys() or not found[EXPORTED[STEP][0]]:
            assert time.monotonic() < deadline, found
            assert thread.is_alive()
            time.sleep(1)
            found = exported_values(run_label(config.run_place))
        # Twice as long as a node keeps a value that is not set again.
        time.sleep(40)
        later = exported_values(run_label(config.run_place))
        stop.request()
        thread.join(120)
    assert not thread.is_alive()
    assert (found[RESTARTS], found[STALLS]) == (0, 0)
    assert found.keys() <= later.keys()
    assert later[EXPORTED[STEP][0]] > found[EXPORTED[STEP][0]]
    assert later[EXPORTED[metrics.EVAL_LOSS][0]] == found[EXPORTED[metrics.EVAL_LOSS][0]]
    assert 0 < found[EXPORTED[metrics.LOSS][0]] < 20
    assert EXPORTED[metrics.MFU][0] not in found  # unknown on CPUs
