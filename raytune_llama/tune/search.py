"""Search algorithms, and the searcher that hands their samples to Tune."""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ray.tune.search import Searcher

from raytune_llama.config.settings import ConfigError
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.orchestration.launch import PreparedRun
from raytune_llama.tune.config import SearchConfig, SweepConfig, build_trial_config
from raytune_llama.tune.constraints import Constraints
from raytune_llama.tune.journal import Journal, TrialRecord, trial_dir
from raytune_llama.tune.space import (
    RandomSuggester,
    SearchSpace,
    TrialSample,
    build_grid,
    draw_sample,
    drawn_parameters,
    format_sample,
)

logger = logging.getLogger(__name__)

MAX_CHECKED_SAMPLES = 200
"""Minimum number of random samples to check before the first trial of a `tpe` search."""


class TrialSampler(Protocol):
    """Chooses the sample of each trial."""

    def sample(self, number: int, history: Sequence[TrialRecord]) -> TrialSample:
        """Return the sample of the trial with this number, given all started trials."""
        ...


class RandomSampler:
    """Independent draws; a sample depends only on the seed and the trial's number."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space, self._seed = space, seed

    def sample(self, number: int, history: Sequence[TrialRecord] = ()) -> TrialSample:  # noqa: ARG002
        """Return the sample of a trial."""
        return draw_sample(self._space, RandomSuggester(f"{self._seed}:{number}"))


class GridSampler:
    """Every combination of choices, in order."""

    def __init__(self, space: SearchSpace) -> None:
        self._points = build_grid(space)

    def sample(self, number: int, history: Sequence[TrialRecord] = ()) -> TrialSample:  # noqa: ARG002
        """Return the sample of a trial."""
        return self._points[number]


class TpeSampler:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011).

    It is rebuilt for each sample from the journal's trials and a seed per trial: a suggestion
    depends only on the journal, so a killed driver loses nothing. A stopped trial counts as pruned,
    with its evaluations; a running one counts as bad until it ends, so that concurrent trials
    differ. A trial that violates a constraint is worse than all that don't, and the worse the more
    it does.
    """

    def __init__(
        self,
        space: SearchSpace,
        config: SearchConfig,
        mode: str,
        constraints: Constraints | None = None,
    ) -> None:
        self._space, self._config, self._mode = space, config, mode
        self._constraints = constraints or {}

    def sample(self, number: int, history: Sequence[TrialRecord]) -> TrialSample:
        """Return the sample of a trial."""
        import optuna

        with warnings.catch_warnings():
            # Three of its arguments have been marked experimental since 2020 and 2021.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=self._config.startup_trials,
                seed=self._config.seed * 1_000_003 + number,
                multivariate=True,
                constant_liar=True,
                # Never called, since the trials of the study have their violations already.
                constraints_func=(lambda _: ()) if self._constraints else None,
            )
        study = build_study(self._space, self._mode, history, sampler, self._constraints)
        return draw_sample(self._space, study.ask())


def build_sampler(sweep: SweepConfig) -> TrialSampler:
    """Return the sampler of a sweep.

    Raises:
        ConfigError: a grid search over other distributions than choices.
    """
    match sweep.search.kind:
        case "random":
            return RandomSampler(sweep.space, sweep.search.seed)
        case "grid":
            return GridSampler(sweep.space)
        case "tpe":
            return TpeSampler(sweep.space, sweep.search, sweep.mode, sweep.constraints)


def build_study(
    space: SearchSpace,
    mode: str,
    history: Sequence[TrialRecord],
    sampler: Any = None,  # noqa: ANN401
    constraints: Constraints | None = None,
) -> Any:  # noqa: ANN401  # optuna is imported where it is used: it takes a second
    """Return an Optuna study with a sweep's trials."""
    import optuna
    from optuna.trial import TrialState

    # It reports each new study otherwise.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = "minimize" if mode == "min" else "maximize"
    study = optuna.create_study(direction=direction, sampler=sampler)
    states = {
        "finished": TrialState.COMPLETE,
        "stopped": TrialState.PRUNED,
        "running": TrialState.RUNNING,
    }
    for trial in history:
        state = states.get(trial.state, TrialState.FAIL)
        if state == TrialState.COMPLETE and trial.value is None:
            state = TrialState.FAIL
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                params=drawn_parameters(space, trial.sample),
                distributions=optuna_distributions(space),
                intermediate_values=trial.values,
                system_attrs=_describe_feasibility(trial, constraints or {}),
                value=trial.value if state == TrialState.COMPLETE else None,
            )
        )
    return study


def _describe_feasibility(trial: TrialRecord, constraints: Constraints) -> dict[str, Any]:
    """Return how much a trial violates each constraint, where Optuna's samplers look for it."""
    if not constraints:
        return {}
    values = trial.others.get(trial.step, {})
    return {"constraints": [each.violation(values.get(name)) for name, each in constraints.items()]}


def optuna_distributions(space: SearchSpace) -> dict[str, Any]:
    """Return Optuna's distribution for each drawn field."""
    from optuna import distributions

    found: dict[str, Any] = {}
    for field, kind in space.items():
        if kind.choice is not None:
            positions = list(range(len(kind.choice)))
            found[field] = distributions.CategoricalDistribution(positions)
        elif kind.randint is not None:
            found[field] = distributions.IntDistribution(*kind.randint)
        elif kind.uniform is not None:
            found[field] = distributions.FloatDistribution(*kind.uniform)
        elif kind.loguniform is not None:
            found[field] = distributions.FloatDistribution(*kind.loguniform, log=True)
    return found


def count_trials(sweep: SweepConfig) -> int:
    """Return the number of trials of a sweep.

    Raises:
        ConfigError: `num_trials` exceeds the number of grid points.
    """
    if sweep.search.kind != "grid":
        assert sweep.num_trials is not None
        return sweep.num_trials
    points = len(build_grid(sweep.space))
    if sweep.num_trials is not None and sweep.num_trials > points:
        raise ConfigError(
            [f"num_trials: got {sweep.num_trials}, but the grid has {points} points; set null"]
        )
    return sweep.num_trials or points


def check_samples(sweep: SweepConfig, base: AnyTrainConfig) -> list[AnyTrainConfig]:
    """Build the configs of a sweep's samples: all for grid and random search, random ones for TPE.

    Raises:
        ConfigError: a sample yields an invalid config; lists each mistake once, with an example.
    """
    total = count_trials(sweep)
    if sweep.search.kind == "tpe":
        sampler, total = (
            RandomSampler(sweep.space, sweep.search.seed),
            max(total, MAX_CHECKED_SAMPLES),
        )
    else:
        sampler = build_sampler(sweep)
    configs: list[AnyTrainConfig] = []
    examples: dict[str, TrialSample] = {}
    for number in range(total):
        sample = sampler.sample(number, ())
        try:
            configs.append(build_trial_config(base, sample, trial_dir(sweep.place, number)))
        except ConfigError as error:
            for problem in error.problems:
                examples.setdefault(problem, sample)
    if examples:
        bad = total - len(configs)
        head = f"space: {bad} of {total} samples yield an invalid config; narrow the space"
        raise ConfigError(
            [head, *(f"{text} (with {format_sample(s)})" for text, s in examples.items())]
        )
    return configs


class TrialSearcher(Searcher):
    """Hands trials to Tune: first unfinished ones, then new ones.

    It saves no searcher state in Tune, since the journal holds it.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        journal: Journal,
        prepare: Callable[[int, TrialSample], PreparedRun | None],
    ) -> None:
        """Start with the journal's unfinished trials.

        Args:
            sweep: config of the sweep.
            journal: journal of the sweep.
            prepare: prepares a trial to start, from its number and sample; returns None if it
                already has its result. Raises ConfigError if it can't run.
        """
        super().__init__()
        self._journal, self._prepare = journal, prepare
        self._sampler, self._total = build_sampler(sweep), count_trials(sweep)
        self._waiting = [t.number for t in journal.trials.values() if not t.has_ended]
        self._is_stopped = False

    def stop(self) -> None:
        """Hand out no more trials; safe in a signal handler."""
        self._is_stopped = True

    def suggest(self, trial_id: str) -> dict[str, Any] | None:  # noqa: ARG002  # Tune's signature
        """Return the next trial: its number and its prepared run."""
        while not self._is_stopped and (self._waiting or len(self._journal.trials) < self._total):
            number = self._waiting.pop(0) if self._waiting else self._begin()
            try:
                run = self._prepare(number, self._journal.trials[number].sample)
            except ConfigError as error:
                logger.warning("trial %d can't run: %s", number, error)
                self._journal.end(number, "failed", str(error))
                continue
            return {"number": number, "run": run}
        return Searcher.FINISHED  # pyright: ignore[reportReturnType]  # Tune's mark of the end

    def put_back(self, number: int) -> None:
        """Let `suggest` return a trial again, which was interrupted."""
        self._waiting.append(number)

    def _begin(self) -> int:
        number = len(self._journal.trials)
        sample = self._sampler.sample(number, list(self._journal.trials.values()))
        self._journal.start(number, sample)
        return number

    def on_trial_complete(
        self,
        trial_id: str,
        result: dict[str, Any] | None = None,
        error: bool = False,  # noqa: FBT001, FBT002  # Tune's signature
    ) -> None:
        """Do nothing: the journal is the state."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the journal is the state."""


def count_remaining(sweep: SweepConfig, journal: Journal) -> int:
    """Return the number of trials that have not ended, those not yet started included."""
    ended = sum(trial.has_ended for trial in journal.trials.values())
    return max(count_trials(sweep), len(journal.trials)) - ended
