"""The driver of a sweep: check, prepare, run the trials with Tune, summarize."""

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray import tune
from ray.tune.experiment import Trial

from raytune_llama.config.settings import (
    ConfigError,
    find_differences,
    identity,
    override,
    to_dict,
    to_yaml,
)
from raytune_llama.connection import connect_to_ray
from raytune_llama.data.build.preparation import (
    DataInputs,
    describe_inputs,
    open_current_store,
    prepare_data,
)
from raytune_llama.data.store.manifest import fingerprint_of
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.signals import StopSignal
from raytune_llama.storage.lease import Fence, Lease
from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.export import read_result
from raytune_llama.train.identity import (
    IDENTITY_FILE,
    check_identity,
    identify,
    keep_recorded_bos,
    read_identity,
)
from raytune_llama.train.inputs import build_evaluation_sources
from raytune_llama.train.monitoring.metrics import EVAL_BITS_PER_BYTE, EVAL_LOSS
from raytune_llama.train.orchestration.channel import Channel
from raytune_llama.train.orchestration.launch import PreparedRun
from raytune_llama.train.orchestration.nodes import (
    check_nodes,
    count_worker_slots,
    is_submitted_job,
    wait_for_resources,
)
from raytune_llama.train.orchestration.placement_group import WorkerPlacement
from raytune_llama.train.preflight import open_inputs, resolve_places
from raytune_llama.train.trainer import prepare_run
from raytune_llama.tune.config import SweepConfig, build_trial_config, load_base
from raytune_llama.tune.display import ProgressDisplay
from raytune_llama.tune.findings import Finding, describe_findings, measure_importances
from raytune_llama.tune.journal import Journal, TrialRecord, trial_dir
from raytune_llama.tune.plot import write_page
from raytune_llama.tune.results import (
    RESOLVED_SWEEP_FILE,
    rank_trials,
    score_trial,
    write_best,
    write_leaderboard,
)
from raytune_llama.tune.scheduler import build_scheduler, replay_journal
from raytune_llama.tune.search import TrialSearcher, check_samples, count_remaining
from raytune_llama.tune.space import TrialSample
from raytune_llama.tune.trial import STEP_KEY, build_trainable

logger = logging.getLogger(__name__)

TRIAL_MEMORY_BYTES = 2**30
"""Memory reserved per trial for its driver and Ray Train's controller, in bytes."""


@dataclass(frozen=True)
class SweepSummary:
    """State of a sweep when its driver ends."""

    status: Literal["finished", "stopped", "failed"]
    """Stopped: trials remain, and the same command resumes them. Failed: no trial has a result."""

    sweep_dir: Place
    """Directory of the sweep."""

    trials: tuple[TrialRecord, ...]
    """All trials, best first."""

    best_config: Place | None
    """Config file of the best trial; None if no trial has a score."""

    page: Place | None
    """HTML page with plots; None if no trial has been evaluated."""

    findings: tuple[Finding, ...]
    """How the trials ended, what to widen, which fields matter, and commands for the best trial."""


def run_sweep(sweep: SweepConfig) -> SweepSummary:
    """Run or resume a sweep; its progress is shown on stderr.

    Raises:
        ConfigError: the sweep, its base or the cluster does not allow it; raised before any trial
            starts.
    """
    base = _resolve(sweep)
    check_sweep(sweep, base)
    configs = check_samples(sweep, base)
    _check_stores(base, configs)
    data = open_inputs(configs[0]).data
    # Trials are compared by their evaluations, so eval settings may not change, unlike a run's.
    then = read_identity(sweep.place)
    base_identity = identify(base, like=then.get("base", {}))
    known = {"sweep": identity(sweep), "base": base_identity, "eval": to_dict(base.eval)}
    check_identity(sweep.place, known, field="sweep_dir")
    journal = Journal(sweep.place)
    if count_remaining(sweep, journal):
        # Before Ray starts: the store may be damaged, or stale.
        open_current_store(base.encoded_data, data)
        # A lease on the sweep's directory, which contains the trials' directories.
        with Lease(sweep.place) as lease, connect_to_ray():
            store = _prepare(sweep, base, data)
            _check_store(sweep, store.fingerprint)
            fence = lease.confirm()
            (sweep.place / IDENTITY_FILE).write_json({**known, "store": store.fingerprint})
            (sweep.place / RESOLVED_SWEEP_FILE).write_bytes(to_yaml(sweep).encode())
            _run_trials(sweep, base, journal, data=data, store=store, fence=fence)
    else:
        recorded = then.get("store")
        described = describe_inputs(base.encoded_data, data, like=recorded)
        _check_store(sweep, fingerprint_of(described, like=recorded))
    return _sum_up(sweep, base, journal)


def _check_store(sweep: SweepConfig, fingerprint: str) -> None:
    """Refuse a sweep whose earlier trials were trained on other data."""
    # Sweeps of earlier versions have not recorded it.
    if "store" in read_identity(sweep.place):
        check_identity(sweep.place, {"store": fingerprint}, field="sweep_dir")


def _resolve(sweep: SweepConfig) -> AnyTrainConfig:
    """Return the base config with all paths absolute; its run directory is the sweep's."""
    base = override(load_base(sweep), {"run_dir": sweep.sweep_dir})
    try:
        base = resolve_places(base, in_job=is_submitted_job())
    except ConfigError as error:
        named = [
            f"sweep_dir:{p.removeprefix('run_dir:')}" if p.startswith("run_dir:") else p
            for p in error.problems
        ]
        raise ConfigError([text.replace("run_dir=", "sweep_dir=") for text in named]) from None
    return keep_recorded_bos(base, trial_dir(sweep.place, 0))


def check_sweep(sweep: SweepConfig, base: AnyTrainConfig) -> None:
    """Reject a metric that is never reported, and trials that are never evaluated.

    Raises:
        ConfigError: names the fields.
    """
    problems: list[str] = []
    every = base.eval.every_steps
    name = sweep.metric
    if not (name in {EVAL_LOSS, EVAL_BITS_PER_BYTE} or name.startswith(f"{EVAL_LOSS}/")):
        problems.append(
            f"metric: got {name}, wanted {EVAL_LOSS}, {EVAL_BITS_PER_BYTE} or {EVAL_LOSS}/SOURCE"
        )
    if name.startswith(EVAL_BITS_PER_BYTE) and sweep.job == "sft":
        problems.append(f"metric: got {name}, which sft runs don't report; use {EVAL_LOSS}")
    if sweep.scheduler.kind != "none":
        if every is None or every >= sweep.max_steps:
            problems.append(
                f"max_steps: a trial has {sweep.max_steps} steps and base's eval.every_steps is "
                f"{every}, so no evaluation could stop it; lower it with fixed.eval.every_steps, "
                "or set scheduler.kind=none"
            )
        elif sweep.scheduler.grace_steps is not None and sweep.scheduler.grace_steps % every:
            problems.append(
                f"scheduler.grace_steps: got {sweep.scheduler.grace_steps}, wanted a multiple of "
                f"base's eval.every_steps, {every}, since trials are compared by their evaluations"
            )
    if problems:
        raise ConfigError(problems)


def _check_stores(base: AnyTrainConfig, configs: list[AnyTrainConfig]) -> None:
    """Reject samples that would need different token stores."""

    def made_from(config: AnyTrainConfig) -> dict[str, Any]:
        data = to_dict(config.encoded_data)
        # Source weights only change how the store is sampled.
        for source in data["sources"]:
            source.pop("weight")
        return {"data": data, "tokenizer": config.model.tokenizer_path}

    first = made_from(base)
    changed = {line for config in configs for line in find_differences(first, made_from(config))}
    if changed:
        raise ConfigError(
            [
                "space: samples differ in inputs of the token store, but a sweep tokenizes once; "
                "remove these fields from space, or set them in fixed (such as model.tokenizer "
                "if models differ)",
                *sorted(changed)[:4],
            ]
        )


def _prepare(sweep: SweepConfig, base: AnyTrainConfig, data: DataInputs) -> TokenStore:
    """Wait for the cluster's resources and build the token store, once for all trials."""
    wait_for_resources(base.scale)
    store = prepare_data(base.encoded_data, data)
    evaluated = build_evaluation_sources(base, store)
    if not evaluated:
        raise ConfigError(
            [
                "metric: nothing is evaluated, since the store has no validation split; set "
                "data.validation_fraction or data.validation of the base"
            ]
        )
    names = {f"{EVAL_LOSS}/{source.name}" for source in evaluated if len(evaluated) > 1}
    if sweep.metric.count("/") > 1 and sweep.metric not in names:
        raise ConfigError(
            [
                f"metric: got {sweep.metric}, wanted one of the sources' metrics: "
                f"{', '.join(sorted(names)) or 'none, with a single source'}"
            ]
        )
    check_nodes(base)
    return store


def _run_trials(
    sweep: SweepConfig,
    base: AnyTrainConfig,
    journal: Journal,
    *,
    data: DataInputs,
    store: TokenStore,
    fence: Fence,
) -> None:
    """Run the remaining trials with Tune, until all have ended or it is interrupted."""

    def prepare(number: int, sample: TrialSample) -> PreparedRun | None:
        config = build_trial_config(base, sample, trial_dir(sweep.place, number))
        # A sample may name paths too.
        config = resolve_places(config, in_job=is_submitted_job())
        open_inputs(config, data)
        return None if read_result(config) is not None else prepare_run(config, store, fence)

    num_left = count_remaining(sweep, journal)
    # An elastic trial takes up to its maximum of workers; if only fewer fit, it runs alone.
    fit = max(
        1, count_worker_slots(ray.nodes(), base.scale.worker_resources) // base.scale.max_workers
    )
    at_a_time = min(fit, sweep.max_concurrent or fit, num_left)
    logger.info("%d trials remaining, at most %d concurrently", num_left, at_a_time)
    display = ProgressDisplay(sweep, journal)
    freeing = TrialCleanup(sweep.place)
    scheduler = build_scheduler(sweep, base)
    replay_journal(scheduler, journal, sweep.mode)
    _configure_tune()
    searcher = TrialSearcher(sweep, journal, prepare)
    with _stopped_by_signals(searcher) as channel:
        tuner = tune.Tuner(
            tune.with_resources(
                build_trainable(sweep.place, sweep.metric, sweep.mode, sweep.max_steps, channel),
                _driver_resources(),
            ),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=num_left,
                max_concurrent_trials=at_a_time,
                trial_dirname_creator=lambda trial: (
                    f"{trial.config['number']:04d}-{trial.trial_id}"
                ),
            ),
            run_config=tune.RunConfig(
                name=uuid.uuid4().hex[:8],
                storage_path=(sweep.place / "tune").key,
                storage_filesystem=sweep.place.filesystem,
                failure_config=tune.FailureConfig(max_failures=sweep.max_restarts),
                callbacks=[JournalCallback(journal, display.refresh, freeing.start)],
                verbose=0,
            ),
        )
        # Not before: it is pickled with its callbacks, and a live table can't be.
        with display.show():
            tuner.fit()
    freeing.wait()


def _configure_tune() -> None:
    """Silence Tune and turn off what it would do besides running trials."""
    # Silence Tune's messages about its own files, which nobody reads.
    logging.getLogger("ray.tune").setLevel(logging.WARNING)
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)
    # Tune's own files are never read, so each driver writes them to its own directory.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # Tune's new output engine prints a box whatever `verbose` is.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # It would kill the trials, and lose their steps since the last checkpoint.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"


@contextlib.contextmanager
def _stopped_by_signals(searcher: TrialSearcher) -> Iterator[Any]:
    """Let SIGINT, SIGHUP or SIGTERM ask the trials of the block to save and stop.

    Yields the actor in which the trials wait for that.
    """
    plan = "saving the running trials after this step, then stopping"
    with Channel() as channel, StopSignal(plan) as stop:

        def request() -> None:
            searcher.stop()
            channel.request_stop()

        stop.set_callback(request)
        yield channel.actor


def _driver_resources() -> tune.PlacementGroupFactory:
    """Return the resources of a trial's own process, besides those of its workers.

    No CPU, which its workers reserve: trials that held one each could starve their own workers. On
    the driver's node, whose loss ends the sweep in any case: a trial lost with another node would
    leak its workers' placement group if no dashboard runs to remove it.
    """
    address = ray.util.get_node_ip_address()
    return tune.PlacementGroupFactory([{"memory": TRIAL_MEMORY_BYTES, f"node:{address}": 0.001}])


class JournalCallback(tune.Callback):
    """Records reports and ends of Tune's trials in the journal; frees their workers.

    Tune stops a trial by killing its process, which can't free anything then.
    """

    def __init__(
        self, journal: Journal, refresh: Callable[[], None], free: Callable[[int], None]
    ) -> None:
        self._journal, self._refresh, self._free = journal, refresh, free

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:  # noqa: ANN401, ARG002
        """Refresh the progress display."""
        self._refresh()

    def on_trial_result(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Trial],  # noqa: ARG002
        trial: Trial,
        result: dict[str, Any],
        **info: Any,  # noqa: ANN401, ARG002
    ) -> None:
        """Record an evaluation that the journal does not have yet."""
        number, value = trial.config["number"], result.get("value")
        if value is not None and result[STEP_KEY] > self._journal.trials[number].step:
            self._journal.report(number, result[STEP_KEY], value, result["seconds"])

    def on_trial_complete(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Trial],  # noqa: ARG002
        trial: Trial,
        **info: Any,  # noqa: ANN401, ARG002
    ) -> None:
        """Record how a trial has ended."""
        result = trial.last_result or {}
        state = result.get("state", "running")
        if state == "interrupted":
            # It continues when the sweep is resumed.
            self._free(trial.config["number"])
            return
        # Tune completes a trial that is still running only if the scheduler stops it.
        state = "stopped" if state == "running" else state
        cause = result.get("cause") if state in {"failed", "diverged"} else None
        if state == "diverged" and cause is None:
            cause = f"the evaluation at step {result[STEP_KEY]} is not finite"
        self._journal.end(trial.config["number"], state, cause)
        self._free(trial.config["number"])

    def on_trial_error(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Trial],  # noqa: ARG002
        trial: Trial,
        **info: Any,  # noqa: ANN401, ARG002
    ) -> None:
        """Record that a trial has failed permanently."""
        cause = str(trial.get_error() or "unknown").strip().splitlines()[-1]
        self._journal.end(trial.config["number"], "failed", cause)
        self._free(trial.config["number"])

    def on_trial_recover(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Trial],  # noqa: ARG002
        trial: Trial,
        **info: Any,  # noqa: ANN401, ARG002
    ) -> None:
        """Free the workers of a trial that Tune restarts, so that it can reserve them again."""
        self._free(trial.config["number"])


def _sum_up(sweep: SweepConfig, base: AnyTrainConfig, journal: Journal) -> SweepSummary:
    trials = rank_trials(list(journal.trials.values()), base, sweep.mode)
    write_leaderboard(sweep, base, trials)
    best = trials[0] if trials and score_trial(trials[0], base, sweep.mode) else None
    importances = measure_importances(sweep, base, trials)
    findings = describe_findings(sweep, base, trials, importances)
    page = write_page(sweep, base, trials, importances, findings)
    is_over = not count_remaining(sweep, journal)
    status = "stopped" if not is_over else "finished" if best else "failed"
    file = write_best(sweep, base, best) if best else None
    return SweepSummary(status, sweep.place, tuple(trials), file, page, tuple(findings))


class TrialCleanup:
    """Cleans up ended trials, with one thread per trial that waits for its processes to end."""

    def __init__(self, sweep_dir: Place) -> None:
        self._sweep_dir = sweep_dir
        # Not a pool: Tune pickles its callbacks before the first trial, and pools can't be pickled.
        self._threads: list[threading.Thread] = []

    def start(self, number: int) -> None:
        """Start to free a trial's workers."""
        # Read now: a restarted trial records other workers.
        reserved = WorkerPlacement.read(trial_dir(self._sweep_dir, number))
        if reserved is not None:
            thread = threading.Thread(target=reserved.release, name=f"free-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def wait(self) -> None:
        """Wait for all started cleanups; each takes at most `END_SECONDS`."""
        for thread in self._threads:
            thread.join()
