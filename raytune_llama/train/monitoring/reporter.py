"""Per-step metrics and progress logging.

Every worker calls the same methods; rank 0 writes.
"""

import contextlib
import logging
import math
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import zip_longest
from types import TracebackType
from typing import Self

from raytune_llama.data.batches.provenance import Provenance
from raytune_llama.data.batches.step_batches import StepBatch, StepTotal
from raytune_llama.model.llama import SummedLoss, causal_lm
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint.layout import RunState, SaveResult
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.engines.config import BadStepAction
from raytune_llama.train.engines.protocol import StepResult
from raytune_llama.train.monitoring import metrics
from raytune_llama.train.monitoring.flops import flops_per_token, peak_flops, peak_memory_gib
from raytune_llama.train.monitoring.incident_log import BAD_STEPS_FILE, SPIKES_FILE, IncidentLog
from raytune_llama.train.monitoring.loss_spikes import SpikeDetector
from raytune_llama.train.monitoring.metrics import MetricsLog, read_metrics, run_label
from raytune_llama.train.process_group import ProcessGroup

logger = logging.getLogger(__name__)


class Reporter:
    """Times the training loop, updates the run's state, and records both."""

    def __init__(
        self,
        config: AnyTrainConfig,
        origins: Provenance,
        module: SummedLoss,
        state: RunState,
        workers: ProcessGroup,
    ) -> None:
        plan = origins.plan
        self._config = config
        self._origins = origins
        self._plan = plan
        self._last_step = min(config.stop_step or plan.num_steps, plan.num_steps)
        self._workers = workers
        model = causal_lm(module.model)
        self._flops_per_token = flops_per_token(model, plan.sequence_tokens)
        peak = peak_flops(workers.device)
        self._peak_flops = peak * workers.world_size if peak else None
        self._resumed_step = state.step
        self._label = run_label(config.run_place)
        self._data_seconds = 0.0
        self._started = self._lap = self._counted = time.perf_counter()
        self._log: MetricsLog | None = None
        self._incidents: IncidentLog | None = None
        self._spikes: SpikeDetector | None = None

    def __enter__(self) -> Self:
        if self._workers.is_rank_zero:
            self._open_files(self._config.run_place, self._resumed_step)
            logger.info("%s", self._opening_line())
            if self._workers.restarts:
                self._write(self._resumed_step, {metrics.RESTARTS: self._workers.restarts})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._workers.progress.enter_phase("finishing")
        if self._log is not None:
            self._log.close()
        if self._incidents is not None:
            self._incidents.close()

    def _open_files(self, run_dir: Place, resumed_step: int) -> None:
        config = self._config.logging
        self._incidents = IncidentLog(run_dir, self._origins, resumed_step=resumed_step)
        if config.spike_factor is not None:
            past = self._past_losses(run_dir, resumed_step)
            self._spikes = SpikeDetector(config.spike_factor, config.spike_window_steps, past)
        self._log = MetricsLog(run_dir, resumed_step=resumed_step, tensorboard=config.tensorboard)

    @staticmethod
    def _past_losses(run_dir: Place, resumed_step: int) -> list[float]:
        """Return the losses of the steps that do not run again."""
        return [
            record[metrics.LOSS]
            for record in (read_metrics(run_dir) if resumed_step else ())
            if record["step"] <= resumed_step and record.get(metrics.LOSS) is not None
        ]

    def _opening_line(self) -> str:
        batch = self._plan
        per_token = self._flops_per_token / 1e9
        known = "" if self._peak_flops else ", MFU not reported (unknown peak FLOP/s of the device)"
        if batch.num_steps == 0:
            return f"max_steps is 0: evaluation only, on {self._workers.world_size} workers"
        return (
            f"steps {self._resumed_step} to {batch.num_steps}: {batch.sequences_per_step} "
            f"sequences of {batch.sequence_tokens} tokens per step on "
            f"{self._workers.world_size} workers ({self._workers.device.type}); "
            f"{per_token:.3g} GFLOP per token{known}"
        )

    def time_batches(self, batches: Iterable[StepBatch]) -> Iterator[StepBatch]:
        """Yield the batches, and time how long the loop waits for each."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self._data_seconds = time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def log_step(
        self, state: RunState, batch: StepBatch, result: StepResult, total: StepTotal, rate: float
    ) -> RunState:
        """Record an optimizer step; return the state after it.

        Args:
            state: state before the step.
            batch: this worker's share of the step's batch.
            result: result of the step.
            total: totals of the step's batch over all workers.
            rate: learning rate of the step.
        """
        self._workers.progress.record_step(batch.step + 1)
        seconds = self._lap_seconds()
        num_targets, is_bad = total.num_targets, result.is_bad
        state = replace(
            state,
            step=batch.step + 1,
            tokens=state.tokens + num_targets,
            source_sequences=_added(state.source_sequences, total.source_sequences),
            source_targets=_added(state.source_targets, total.source_targets),
            num_skipped_steps=state.num_skipped_steps + (not result.was_applied and not is_bad),
            num_bad_steps=state.num_bad_steps + is_bad,
            num_bad_in_row=0 if result.was_applied else state.num_bad_in_row + is_bad,
            seconds=state.seconds + self._uncounted_seconds(),
        )
        values = {
            metrics.LOSS: result.loss_sum / max(num_targets, 1),
            metrics.LEARNING_RATE: rate,
            metrics.GRAD_NORM: result.grad_norm,
            metrics.TARGET_TOKENS: num_targets,
            metrics.INPUT_TOKENS: total.num_tokens,
            metrics.TOKENS_PER_SECOND: num_targets / seconds,
            metrics.FILLER_SEQUENCES: float(self._count_filler(batch.step)),
            metrics.STEP_SECONDS: seconds,
            metrics.DATA_SECONDS: self._data_seconds,
            metrics.DATA_SHARE: self._data_seconds / seconds,
            metrics.PEAK_MEMORY: peak_memory_gib(self._workers.device),
        }
        if self._peak_flops:
            flops = total.num_tokens / seconds * self._flops_per_token
            values[metrics.MFU] = flops / self._peak_flops
        if self._config.engine.precision == "fp16":
            values[metrics.LOSS_SCALE] = result.loss_scale
            values[metrics.SKIPPED_STEPS] = float(state.num_skipped_steps)
        if state.num_bad_steps:
            values[metrics.BAD_STEPS] = float(state.num_bad_steps)
            values[metrics.UNDONE_STEPS] = float(state.num_undone_steps)
        self._look_for_spike(state.step, values[metrics.LOSS])
        self._write(state.step, values)
        if self._is_shown(state.step):
            logger.info("%s", self._progress_line(state, values))
        return state

    def log_bad_step(
        self, state: RunState, result: StepResult, action: BadStepAction, suspects: Collection[int]
    ) -> None:
        """Record a step with a non-finite loss or gradient: its samples, and the action taken.

        Args:
            state: state after the step.
            result: result of the step.
            action: action taken.
            suspects: positions of the samples in micro-batches whose loss was not finite.
        """
        if self._incidents is None:
            return
        facts = {
            "loss_sum": result.loss_sum,
            "grad_norm": result.grad_norm,
            "answer": action,
            "rollback_step": state.rollback_step if action == "rollback" else None,
        }
        self._incidents.write(BAD_STEPS_FILE, state.step, facts, suspects)
        logger.warning(
            "step %d: non-finite loss or gradient, update skipped (summed loss %s, gradient norm "
            "%s); action: %s (bad steps: %d, in a row: %d); its samples are in %s",
            state.step,
            result.loss_sum,
            result.grad_norm,
            action,
            state.num_bad_steps,
            state.num_bad_in_row,
            BAD_STEPS_FILE,
        )

    def _look_for_spike(self, step: int, loss: float) -> None:
        if self._incidents is None or self._spikes is None or not math.isfinite(loss):
            return
        bound = self._spikes.observe(loss)
        if bound is not None:
            self._incidents.write(SPIKES_FILE, step, {"loss": loss, "bound": bound})
            logger.warning(
                "step %d: loss spike: %.4f is above the threshold of %.4f; its samples are in %s",
                step,
                loss,
                bound,
                SPIKES_FILE,
            )

    def _count_filler(self, step: int) -> int:
        """Return the number of filler sequences of a step over all workers."""
        plan, num_workers = self._plan, self._workers.world_size
        rows = plan.num_micro_batches(num_workers) * plan.micro_batch_sequences * num_workers
        return rows - len(plan.positions(step, 0, 1))

    def _is_shown(self, step: int) -> bool:
        every = self._config.logging.every_steps
        first = step == self._resumed_step + 1
        return self._workers.is_rank_zero and (first or step == self._last_step or not step % every)

    def _progress_line(self, state: RunState, values: dict[str, float]) -> str:
        done = state.step - self._resumed_step
        left = self._last_step - state.step
        to_go = (time.perf_counter() - self._started) / done * left
        mfu = f", MFU {values[metrics.MFU]:.1%}" if metrics.MFU in values else ""
        skipped = f", {state.num_skipped_steps} skipped" if state.num_skipped_steps else ""
        skipped += f", {state.num_bad_steps} bad" if state.num_bad_steps else ""
        return (
            f"step {state.step}/{self._plan.num_steps}: loss {values[metrics.LOSS]:.4f}, "
            f"lr {values[metrics.LEARNING_RATE]:.3g}, "
            f"grad norm {values[metrics.GRAD_NORM]:.3g}, "
            f"{values[metrics.TOKENS_PER_SECOND]:,.0f} tokens/s{mfu}{skipped}, "
            f"{timedelta(seconds=round(to_go))} to go"
        )

    def log_evaluation(self, state: RunState, values: dict[str, float], seconds: float) -> RunState:
        """Record an evaluation; return the state with its time and, if improved, the best step."""
        self._write(state.step, {**values, metrics.EVAL_SECONDS: seconds})
        if self._workers.is_rank_zero:
            found = metrics.describe_evaluation(values)
            logger.info("evaluation at step %d: %s (%.1f s)", state.step, found, seconds)
        if self._log is not None:
            self._log.sync()
        self._lap_seconds()
        state = replace(state, seconds=state.seconds + self._uncounted_seconds())
        return state.with_loss(values.get(metrics.EVAL_LOSS))

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Exclude the block, in which training waits, from the next step's time."""
        if self._log is not None:
            # A run that resumes from the checkpoint keeps the records up to it.
            self._log.sync()
        with self._workers.progress.during("saving"):
            yield
        self._lap_seconds()

    def saved(self, result: SaveResult) -> None:
        """Record the outcome of a checkpoint."""
        values = {metrics.CHECKPOINT_STALL_SECONDS: result.stall_seconds}
        if result.problem is None:
            values[metrics.CHECKPOINT_WRITE_SECONDS] = result.write_seconds
        else:
            values[metrics.CHECKPOINT_FAILED] = 1.0
        self._write(result.step, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._log is not None:
            self._log.write(step, values)
            self._workers.progress.record_values(self._label, step, values)

    def _lap_seconds(self) -> float:
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        return seconds

    def _uncounted_seconds(self) -> float:
        """Return the seconds not yet counted in the run's state, those of saving included."""
        now = time.perf_counter()
        seconds, self._counted = now - self._counted, now
        return seconds


def _added(counts: list[int], more: tuple[int, ...]) -> list[int]:
    """Add lists element by element; an empty one, before the first step, counts as zeros."""
    return [a + b for a, b in zip_longest(counts, more, fillvalue=0)]
