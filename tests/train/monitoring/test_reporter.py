"""Promise: what a run tells is what happened, over all its starts."""

import logging
import re
from dataclasses import replace

import pytest
import torch

from raytune_llama.config.settings import override
from raytune_llama.data.batches.step_batches import StepTotal
from raytune_llama.train.checkpoint.layout import RunState, checkpoint_path
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.engines.protocol import StepResult
from raytune_llama.train.loop import Session, open_session, read_batches
from raytune_llama.train.monitoring import metrics
from raytune_llama.train.monitoring.metrics import read_metrics
from raytune_llama.train.monitoring.reporter import Reporter
from raytune_llama.train.process_group import ProcessGroup
from tests.train.conftest import MakeConfig, run_here

TOTAL = StepTotal(source_sequences=(3, 1), source_targets=(20, 5), num_tokens=27)
RESULT = StepResult(loss_sum=50.0, grad_norm=2.0, was_applied=True, loss_scale=1.0)


def state_at(config: PretrainConfig, step: int) -> RunState:
    manifest = checkpoint_path(config.run_place, step) / "manifest.json"
    return RunState(**manifest.read_json()["state"])


def shown_steps(caplog: pytest.LogCaptureFixture) -> list[int]:
    found = [re.match(r"step (\d+)/", record.getMessage()) for record in caplog.records]
    caplog.clear()
    return [int(match[1]) for match in found if match]


def open_report(session: Session, state: RunState, *, world_size: int = 1) -> Reporter:
    workers = ProcessGroup(rank=0, world_size=world_size, device=torch.device("cpu"))
    return Reporter(session.config, session.provenance, session.engine.module, state, workers)


def test_report_over_two_starts_adds_up_and_shows_the_steps_asked_for(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(logging__every_steps=4, max_steps=10)
    with caplog.at_level(logging.INFO, logger="raytune_llama"):
        run_here(config, stop_after=5)
        assert shown_steps(caplog) == [1, 4]
        stopped = state_at(config, 5)
        run_here(config)
        # The first of a start, each at the interval, and the last.
        assert shown_steps(caplog) == [6, 8, 10]
    records = read_metrics(config.run_place)
    finished = state_at(config, 10)

    def values(name: str) -> list[float]:
        return [record[name] for record in records if name in record]

    targets = values(metrics.TARGET_TOKENS)
    assert len(targets) == 10
    assert stopped.tokens == sum(targets[:5])
    assert finished.tokens == sum(targets)
    assert (finished.source_sequences, finished.source_targets) == ([40], [sum(targets)])
    spent = sum(values(metrics.STEP_SECONDS)) + sum(values(metrics.EVAL_SECONDS))
    assert spent <= finished.seconds + 1e-6
    assert finished.seconds > stopped.seconds > 0
    losses = {
        record["step"]: record[metrics.EVAL_LOSS]
        for record in records
        if metrics.EVAL_LOSS in record
    }
    assert set(losses) == {0, 3, 6, 9, 10}
    best = min(losses, key=lambda step: losses[step])
    assert (finished.best_step, finished.best_loss) == (best, losses[best])


def test_report_step_counts_what_is_done_and_the_filler_of_all_workers(
    make_config: MakeConfig,
) -> None:
    # Three workers take 2, 1 and 1 of four sequences, in two micro-batches each.
    session = open_session(
        make_config(batch__micro_batch_sequences=1), ProcessGroup.single_process()
    )
    start = RunState(tokens=7, source_sequences=[1, 2], source_targets=[3, 4], num_skipped_steps=1)
    batch = next(iter(read_batches(session, 0)))
    overflowed = replace(RESULT, was_applied=False, grad_norm=float("inf"), loss_scale=1024.0)
    with open_report(session, start, world_size=3) as report:
        state = report.log_step(start, batch, overflowed, TOTAL, 0.5)
    assert (state.step, state.tokens, state.num_skipped_steps) == (1, 32, 2)
    assert (state.source_sequences, state.source_targets) == ([4, 3], [23, 9])
    (record,) = read_metrics(session.config.run_place)
    assert record["step"] == 1
    assert record[metrics.LOSS] == 2.0
    assert record[metrics.LEARNING_RATE] == 0.5
    assert record[metrics.GRAD_NORM] is None
    assert record[metrics.FILLER_SEQUENCES] == 2.0
    assert record[metrics.TOKENS_PER_SECOND] * record[metrics.STEP_SECONDS] == pytest.approx(25)


def test_report_evaluation_best_is_the_lowest_finite_loss(make_config: MakeConfig) -> None:
    session = open_session(make_config(), ProcessGroup.single_process())
    state = RunState()
    best: list[int | None] = []
    with open_report(session, state) as report:
        for step, loss in enumerate([float("nan"), 3.0, 2.0, float("nan"), 2.5, 1.0, 1.0]):
            values = {metrics.EVAL_LOSS: loss, metrics.EVAL_BITS_PER_BYTE: loss}
            state = report.log_evaluation(replace(state, step=step), values, 0.1)
            best.append(state.best_step)
    assert best == [None, 1, 2, 2, 2, 5, 5]
    assert state.best_loss == 1.0


def test_report_saving_time_is_part_of_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    session = open_session(make_config(), ProcessGroup.single_process())
    batch = next(iter(read_batches(session, 0)))
    state = RunState(seconds=100.0)
    with open_report(session, state) as report:
        clock[0] += 1.0
        state = report.log_step(state, batch, RESULT, TOTAL, 0.5)
        with report.saving():
            clock[0] += 4.0
        clock[0] += 2.0
        state = report.log_step(state, batch, RESULT, TOTAL, 0.5)
    assert state.seconds == 107.0
    steps = [r for r in read_metrics(session.config.run_place) if metrics.LOSS in r]
    assert [record[metrics.STEP_SECONDS] for record in steps] == [1.0, 2.0]


def test_report_waiting_for_data_is_timed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    session = open_session(make_config(), ProcessGroup.single_process())
    batch = next(iter(read_batches(session, 0)))

    def slow() -> object:
        clock[0] += 3.0
        yield batch

    state = RunState()
    with open_report(session, state) as report:
        for timed in report.time_batches(slow()):  # pyright: ignore[reportArgumentType]
            clock[0] += 1.0
            state = report.log_step(state, timed, RESULT, TOTAL, 0.5)
    (record,) = read_metrics(session.config.run_place)
    assert (record[metrics.DATA_SECONDS], record[metrics.DATA_SHARE]) == (3.0, 0.75)


def test_report_only_the_first_worker_writes(make_config: MakeConfig) -> None:
    config = make_config()
    session = open_session(config, ProcessGroup.single_process())
    second = ProcessGroup(rank=1, world_size=2, device=torch.device("cpu"))
    quiet = override(config, {"logging.every_steps": 1})
    state = RunState()
    with Reporter(quiet, session.provenance, session.engine.module, state, second) as report:
        state = report.log_step(state, next(iter(read_batches(session, 0))), RESULT, TOTAL, 0.5)
    assert state.step == 1
    assert not config.run_place.exists()
