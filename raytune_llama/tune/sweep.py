"""The driver of a sweep: check, prepare, run the trials with Tune, summarize."""

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from raytune_llama.config.settings import (
    ConfigError,
    find_differences,
    identity,
    override,
    renamed_fields,
    to_dict,
    to_yaml,
)
from raytune_llama.connection import connect_to_ray
from raytune_llama.data.build.preparation import (
    describe_inputs,
    open_current_store,
    prepare_data,
)
from raytune_llama.data.store.manifest import fingerprint_of
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.evaluate.tasks.task import EvaluationTask
from raytune_llama.signals import StopSignal
from raytune_llama.storage.lease import Fence, Lease
from raytune_llama.storage.place import Place, is_submitted_job
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.eval_config import EvalConfig
from raytune_llama.train.export import read_result
from raytune_llama.train.fetched_inputs import fetch_inputs, find_remote_inputs
from raytune_llama.train.identity import (
    IDENTITY_FILE,
    check_identity,
    identify,
    identify_evaluated,
    keep_recorded_bos,
    read_identity,
)
from raytune_llama.train.inputs import build_evaluation_sources
from raytune_llama.train.monitoring.trackers.session import check_trackers
from raytune_llama.train.orchestration.channel import Channel
from raytune_llama.train.orchestration.launch import PreparedRun
from raytune_llama.train.orchestration.nodes import check_nodes
from raytune_llama.train.orchestration.placement_group import WorkerPlacement
from raytune_llama.train.orchestration.resources import wait_for_resources
from raytune_llama.train.preflight import Inputs, open_inputs, resolve_places
from raytune_llama.train.run_files import EVALUATED_KEY
from raytune_llama.train.texts import check_text_store, prepare_texts
from raytune_llama.train.trainer import prepare_run
from raytune_llama.tune.config import SweepConfig, build_trial_config, load_base
from raytune_llama.tune.display import ProgressDisplay
from raytune_llama.tune.findings import Finding, describe_findings, measure_importances
from raytune_llama.tune.journal import Journal, TrialRecord, trial_dir
from raytune_llama.tune.metric_checks import check_metrics, evaluation_interval, watched_metrics
from raytune_llama.tune.pack_plan import check_pack, choose_num_slots, render_sweep_plan
from raytune_llama.tune.packed import PackedTrials
from raytune_llama.tune.plot import write_page
from raytune_llama.tune.results import (
    BEST_FILE,
    RESOLVED_SWEEP_FILE,
    find_best,
    rank_trials,
    write_best,
    write_leaderboard,
)
from raytune_llama.tune.scheduler import build_scheduler, replay_journal
from raytune_llama.tune.search import TrialSearcher, check_samples, count_remaining
from raytune_llama.tune.space import TrialSample
from raytune_llama.tune.tracking import track_sweep
from raytune_llama.tune.trial import STEP_KEY, build_trainable

logger = logging.getLogger(__name__)

TRIAL_MEMORY_BYTES = 2**30
"""Memory reserved per trial for its driver and Ray Train's controller, in bytes."""


@dataclass(frozen=True)
class SweepSummary:
    """State of a sweep when its driver ends."""

    status: Literal["finished", "stopped", "failed"]
    """Stopped: trials remain, and the same command resumes them. Failed: no trial has a result that
    meets the constraints."""

    sweep_dir: Place
    """Directory of the sweep."""

    trials: tuple[TrialRecord, ...]
    """All trials, best first; those that violate a constraint after the others."""

    best_config: Place | None
    """Config file of the best trial; None if no trial has a score and meets the constraints."""

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
    base, configs = _open_configs(sweep)
    fetch_inputs(configs[0])
    inputs = open_inputs(configs[0])
    then = read_identity(sweep.place)
    known = identify_sweep(sweep, base, then)
    check_identity(sweep.place, known, field="sweep_dir")
    journal = Journal(sweep.place)
    with track_sweep(sweep, base, journal) as tracked:
        if count_remaining(sweep, journal):
            # Before Ray starts: the store may be damaged, or stale.
            open_current_store(base.encoded_data, inputs.data)
            check_text_store(base, inputs.texts)
            check_trackers(base.logging)
            # A lease on the sweep's directory, which contains the trials' directories.
            with Lease(sweep.place) as lease, connect_to_ray():
                stores = _prepare(sweep, base, inputs)
                inputs_now = stores.identify(inputs.tasks)
                _check_stored(sweep, inputs_now)
                fence = lease.confirm()
                (sweep.place / IDENTITY_FILE).write_json({**known, **inputs_now})
                (sweep.place / RESOLVED_SWEEP_FILE).write_bytes(to_yaml(sweep).encode())
                tracked.start()
                _run_trials(sweep, base, journal, inputs=inputs, stores=stores, fence=fence)
        else:
            recorded = then.get("store")
            described = describe_inputs(base.encoded_data, inputs.data, like=recorded)
            _check_stored(sweep, {"store": fingerprint_of(described, like=recorded)})
            tracked.start()
        summary = _sum_up(sweep, base, journal)
        tracked.end("interrupted" if summary.status == "stopped" else summary.status)
    return summary


def plan_sweep(sweep: SweepConfig) -> str:
    """Return what a sweep will take, as text for a terminal; nothing is written.

    Raises:
        ConfigError: the sweep or its base does not allow it.
    """
    _, configs = _open_configs(sweep)
    open_inputs(override(configs[0], {"plan": True}))
    return render_sweep_plan(sweep, configs)


def _open_configs(sweep: SweepConfig) -> tuple[AnyTrainConfig, list[AnyTrainConfig]]:
    """Return the base of a sweep and configs of its samples, checked, their models fetched.

    Weights are not fetched: trials that are never run need none.
    """
    base = _resolve(sweep)
    check_sweep(sweep, base)
    configs = _resolve_samples(check_samples(sweep, base))
    _check_stores(base, configs)
    # Most samples share them, and each fetch asks the hub.
    unlike = {tuple(find_remote_inputs(config).items()): config for config in configs}
    for config in unlike.values():
        fetch_inputs(config, weights=False)
    if sweep.pack is not None:
        check_pack(configs)
    return base, configs


def _resolve_samples(configs: Sequence[AnyTrainConfig]) -> list[AnyTrainConfig]:
    """Return configs with the places that their samples name, on the hub at one commit.

    Raises:
        ConfigError: lists every place that can't be used once.
    """
    in_job = is_submitted_job()
    problems: dict[str, None] = {}
    resolved: list[AnyTrainConfig] = []
    for config in configs:
        try:
            resolved.append(resolve_places(config, in_job=in_job))
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(list(problems))
    return resolved


def identify_sweep(
    sweep: SweepConfig, base: AnyTrainConfig, then: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the identity of a sweep, to which its token stores and tasks are added.

    Args:
        sweep: config of the sweep.
        base: config of every trial, without its sample, with absolute paths.
        then: recorded identity to compare with; empty for a new sweep.
    """
    # Trials are compared by their evaluations, so eval settings may not change, unlike a run's.
    known = {"sweep": identity(sweep), "eval": identity(base.eval)}
    defaults = {"sweep": {"constraints": {}}, "eval": identity(EvalConfig())}
    for part, fields in known.items():
        # An earlier release has not recorded the fields that it did not have.
        old = then.get(part, fields)
        known[part] = {
            name: value
            for name, value in fields.items()
            if name in old or value != defaults[part].get(name)
        }
    return {**known, "base": identify(base, like=then.get("base", {}))}


def _check_stored(sweep: SweepConfig, now: Mapping[str, Any]) -> None:
    """Refuse a sweep whose earlier trials were trained or evaluated on other data."""
    # Sweeps of earlier versions have not recorded all of it.
    recorded = read_identity(sweep.place)
    known = {key: value for key, value in now.items() if key in recorded}
    check_identity(sweep.place, known, field="sweep_dir")


def _resolve(sweep: SweepConfig) -> AnyTrainConfig:
    """Return the base config with all paths absolute; its run directory is the sweep's."""
    base = override(load_base(sweep), {"run_dir": sweep.sweep_dir})
    with renamed_fields({"run_dir:": "sweep_dir:", "run_dir=": "sweep_dir="}):
        first = trial_dir(sweep.place, 0)
        base = resolve_places(base, in_job=is_submitted_job(), recorded_in=first)
    fetch_inputs(base, weights=not sweep.plan)
    return keep_recorded_bos(base, trial_dir(sweep.place, 0))


def check_sweep(sweep: SweepConfig, base: AnyTrainConfig) -> None:
    """Reject metrics that are never reported, and trials that are never evaluated.

    Raises:
        ConfigError: names the fields.
    """
    problems = check_metrics(sweep, base)
    every = evaluation_interval(sweep, base)
    if sweep.scheduler.kind != "none":
        if every is None or every >= sweep.max_steps:
            problems.append(
                f"max_steps: a trial has {sweep.max_steps} steps and base evaluates {sweep.metric} "
                f"every {every} (eval.every_steps, for tasks times eval.tasks_every), so no "
                "evaluation could stop it; lower it with fixed.eval.every_steps, or set "
                "scheduler.kind=none"
            )
        elif sweep.scheduler.grace_steps is not None and sweep.scheduler.grace_steps % every:
            problems.append(
                f"scheduler.grace_steps: got {sweep.scheduler.grace_steps}, wanted a multiple of "
                f"base's eval.every_steps, {every} (for tasks times eval.tasks_every), since "
                "trials are compared by their evaluations"
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


@dataclass(frozen=True)
class _Stores:
    """Token stores that all trials share."""

    data: TokenStore
    texts: TokenStore | None

    def identify(self, tasks: Sequence[EvaluationTask]) -> dict[str, Any]:
        """Return what is trained and evaluated on, by its key in the sweep's identity."""
        evaluated = identify_evaluated(self.texts, tasks)
        return {"store": self.data.fingerprint, EVALUATED_KEY: evaluated}


def _prepare(sweep: SweepConfig, base: AnyTrainConfig, inputs: Inputs) -> _Stores:
    """Wait for the cluster's resources and build the token stores, once for all trials."""
    wait_for_resources(base.scale)
    store = prepare_data(base.encoded_data, inputs.data)
    texts = prepare_texts(base, inputs.texts)
    evaluated = build_evaluation_sources(base, store)
    problems = check_metrics(sweep, base, validated=[source.name for source in evaluated])
    if problems:
        raise ConfigError(problems)
    check_nodes(base)
    return _Stores(store, texts)


def _run_trials(
    sweep: SweepConfig,
    base: AnyTrainConfig,
    journal: Journal,
    *,
    inputs: Inputs,
    stores: _Stores,
    fence: Fence,
) -> None:
    """Run the remaining trials, until all have ended or it is interrupted."""

    def prepare(number: int, sample: TrialSample) -> PreparedRun | None:
        config = build_trial_config(base, sample, trial_dir(sweep.place, number))
        # A sample may name paths too.
        config = resolve_places(config, in_job=is_submitted_job())
        fetch_inputs(config)
        open_inputs(config, inputs)
        if read_result(config) is not None:
            return None
        return prepare_run(config, stores.data, fence, texts=stores.texts, tasks=inputs.tasks)

    # An elastic trial takes up to its maximum of workers; if only fewer fit, it runs alone.
    fit = max(1, base.scale.worker_needs.count_groups(ray.nodes(), base.scale.max_workers))
    display = ProgressDisplay(sweep, journal)
    scheduler = build_scheduler(sweep, base)
    replay_journal(scheduler, journal, sweep)
    searcher = TrialSearcher(sweep, journal, prepare)
    others = watched_metrics(sweep, base, inputs.tasks)
    if sweep.pack is None:
        _run_in_tune(sweep, journal, searcher, scheduler, display, others=others, fit=fit)
        return
    # The workers of a trial are those of its pack, which frees them itself.
    recorder = JournalCallback(journal, display.refresh, lambda number: None)  # noqa: ARG005
    trials = PackedTrials(sweep, journal, searcher, scheduler, recorder, others=others)
    configs = _resolve_samples(check_samples(sweep, base)) if sweep.pack == "auto" else ()
    num_slots = choose_num_slots(sweep, configs, ray.nodes(), fit)
    num_packs = min(fit, -(-count_remaining(sweep, journal) // num_slots))
    trials.run_in(num_packs, num_slots, display)


def _run_in_tune(
    sweep: SweepConfig,
    journal: Journal,
    searcher: TrialSearcher,
    scheduler: TrialScheduler,
    display: ProgressDisplay,
    *,
    others: tuple[str, ...],
    fit: int,
) -> None:
    """Run trials with workers of their own with Tune.

    Args:
        sweep: config of the sweep.
        journal: journal of the sweep.
        searcher: gives the trials.
        scheduler: decides after each evaluation whether a trial continues.
        display: shows the progress.
        others: metrics to report besides that of the sweep.
        fit: number of trials that the nodes can hold now.
    """
    num_left = count_remaining(sweep, journal)
    # More than fit now wait for resources, for which an autoscaler adds nodes.
    at_a_time = min(sweep.max_concurrent or fit, num_left)
    logger.info("%d trials remaining, at most %d concurrently", num_left, at_a_time)
    freeing = TrialCleanup(sweep.place)
    _configure_tune()
    with _stopped_by_signals(searcher) as channel:
        trainable = build_trainable(sweep, others, channel)
        tuner = tune.Tuner(
            tune.with_resources(trainable, _driver_resources()),
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
        """Record an evaluation of a trial."""
        self.record_report(trial.config["number"], result)

    def record_report(self, number: int, report: Mapping[str, Any]) -> None:
        """Record an evaluation that the journal does not have yet."""
        value = report.get("value")
        if value is not None and report[STEP_KEY] > self._journal.trials[number].step:
            self._journal.report(
                number, report[STEP_KEY], value, report["seconds"], report["others"]
            )

    def on_trial_complete(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Trial],  # noqa: ARG002
        trial: Trial,
        **info: Any,  # noqa: ANN401, ARG002
    ) -> None:
        """Record how a trial has ended."""
        self.record_end(trial.config["number"], trial.last_result or {})

    def record_end(self, number: int, report: Mapping[str, Any]) -> None:
        """Record how a trial has ended, from its last report, and free its workers."""
        state = report.get("state", "running")
        if state == "interrupted":
            # It continues when the sweep is resumed.
            self._free(number)
            return
        # A trial that is still running has ended only if the scheduler stops it.
        state = "stopped" if state == "running" else state
        cause = report.get("cause") if state in {"failed", "diverged"} else None
        if state == "diverged" and cause is None:
            cause = f"the evaluation at step {report[STEP_KEY]} is not finite"
        self._journal.end(number, state, cause)
        self._free(number)

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
    trials = rank_trials(sweep, base, list(journal.trials.values()))
    write_leaderboard(sweep, base, trials)
    best = find_best(sweep, base, trials)
    importances = measure_importances(sweep, base, trials)
    findings = describe_findings(sweep, base, trials, importances)
    page = write_page(sweep, base, trials, importances, findings)
    is_over = not count_remaining(sweep, journal)
    status = "stopped" if not is_over else "finished" if best else "failed"
    file = write_best(sweep, base, best) if best else None
    if best is None:
        # Of a trial that violates a constraint only since it was resumed.
        (sweep.place / BEST_FILE).delete()
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
