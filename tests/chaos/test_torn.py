"""Promise: files of Ray's own that are torn do not keep a run from going on."""

import pytest

from raytune_llama.train.checkpoint.layout import list_checkpoints
from raytune_llama.train.trainer import run_training
from tests.pipeline.conftest import MakeJob, losses


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_run_with_a_torn_snapshot_of_ray_goes_on_from_its_newest_checkpoint(
    make_job: MakeJob,
) -> None:
    config = make_job(checkpoint__keep_best=False)
    run_training(config)
    whole, kept = losses(config), list_checkpoints(config.run_place)
    # As if it had been killed after step 6.
    list_checkpoints(config.run_place)[-1].delete()
    (config.run_place / config.result_name).delete()
    snapshot = config.run_place / "ray" / "checkpoint_manager_snapshot.json"
    # With Ray no checkpoint is registered, so that it writes none.
    assert not snapshot.exists()
    snapshot.write_bytes(b'{"checkpoint_results": [{"check')
    summary = run_training(config)
    assert (summary.status, summary.step) == ("finished", 8)
    assert losses(config) == whole
    assert list_checkpoints(config.run_place) == kept
