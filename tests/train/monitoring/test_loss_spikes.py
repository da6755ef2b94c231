"""Promise: a loss far above what was usual is told with the text it is of; training is the same."""

import random
from dataclasses import replace

import pytest

from raytune_llama.data.batches.step_batches import StepTotal
from raytune_llama.train.checkpoint.layout import RunState
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.engines.protocol import StepResult
from raytune_llama.train.loop import open_session, read_batches
from raytune_llama.train.monitoring.incident_log import SPIKES_FILE
from raytune_llama.train.monitoring.loss_spikes import SpikeDetector
from raytune_llama.train.monitoring.metrics import read_records
from raytune_llama.train.monitoring.reporter import Reporter
from raytune_llama.train.process_group import ProcessGroup
from tests.train.conftest import MakeConfig

ONE_TARGET = StepTotal(source_sequences=(4,), source_targets=(1,), num_tokens=9)


def spikes_of(losses: list[float], *, factor: float = 8.0, window: int = 20) -> list[int]:
    watch = SpikeDetector(factor, window)
    return [number for number, loss in enumerate(losses) if watch.observe(loss) is not None]


def noisy(count: int, mean: float = 3.0, deviation: float = 0.1) -> list[float]:
    generator = random.Random(3)
    return [generator.gauss(mean, deviation) for _ in range(count)]


def test_watch_tells_a_spike_and_no_noise() -> None:
    losses = noisy(2000)
    assert spikes_of(losses, window=128) == []
    losses[700] = 4.5
    assert spikes_of(losses, window=128) == [700]


def test_watch_is_not_blinded_by_earlier_spikes() -> None:
    losses = noisy(60)
    losses[30] = losses[33] = 1e9
    losses[36] = 4.5
    assert spikes_of(losses) == [30, 33, 36]


def test_watch_follows_falling_losses_and_a_new_level() -> None:
    falling = [10.0 * 0.98**step for step in range(200)]
    assert spikes_of(falling) == []
    steps_up = noisy(40) + noisy(40, mean=5.0)
    told = spikes_of(steps_up)
    assert told[0] == 40
    assert told[-1] <= 40 + 20 // 2


def test_watch_judges_none_before_half_of_its_window() -> None:
    assert spikes_of([1.0] * 9 + [100.0]) == []
    assert spikes_of([1.0] * 10 + [100.0]) == [10]


def test_watch_takes_no_rounding_for_a_spike() -> None:
    assert spikes_of([2.0] * 20 + [2.0001]) == []


def test_watch_that_goes_on_judges_as_one_that_never_stopped() -> None:
    losses = noisy(100)
    whole = SpikeDetector(2.0, 16)
    bounds = [whole.observe(loss) for loss in losses]
    assert any(bounds[50:])
    later = SpikeDetector(2.0, 16, losses[:50])
    assert [later.observe(loss) for loss in losses[50:]] == bounds[50:]


def report_losses(config: PretrainConfig, losses: list[float], start: int) -> None:
    """Report the steps of a run from one on, as if each had one target of a given loss."""
    session = open_session(config, ProcessGroup.single_process())
    module = session.engine.module
    state = RunState(step=start)
    batch = next(read_batches(session, 0))
    with Reporter(
        config, session.provenance, module, state, ProcessGroup.single_process()
    ) as report:
        for step in range(start, len(losses)):
            result = StepResult(losses[step], 1.0, was_applied=True, loss_scale=1.0)
            state = report.log_step(state, replace(batch, step=step), result, ONE_TARGET, 0.1)


@pytest.mark.parametrize("resumed", [[], [7, 12]])
def test_report_spike_is_written_with_its_samples_also_after_a_resume(
    make_config: MakeConfig, resumed: list[int]
) -> None:
    config = make_config(max_steps=20, logging__spike_window_steps=8)
    losses = [2.0 + 0.01 * (step % 3) for step in range(20)]
    losses[10] = 9.0
    losses[14] = float("nan")
    report_losses(config, losses, 0)
    for start in resumed:
        # Of the steps behind the checkpoint nothing stays twice.
        report_losses(config, losses, start)
    (record,) = read_records(config.run_place / SPIKES_FILE)
    assert (record["step"], record["loss"]) == (11, 9.0)
    assert 2.0 < record["bound"] < 9.0
    assert [sample["position"] for sample in record["samples"]] == [40, 41, 42, 43]
    assert all(sample["documents"] for sample in record["samples"])


def test_report_without_a_factor_or_a_spike_leaves_no_file(make_config: MakeConfig) -> None:
    losses = [2.0] * 19 + [9.0]
    off = make_config("off", max_steps=20, logging__spike_factor=None)
    report_losses(off, losses, 0)
    calm = make_config("calm", max_steps=20, logging__spike_window_steps=8)
    report_losses(calm, losses[:-1], 0)
    for config in (off, calm):
        assert not (config.run_place / SPIKES_FILE).exists()
