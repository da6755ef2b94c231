"""The settings of a sweep."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from raytune_llama.config.settings import PLACEMENT, ConfigError, from_dict, override, settings
from raytune_llama.config.yaml12 import read_mapping
from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig, PretrainConfig, SftConfig
from raytune_llama.tune.space import Distribution, TrialSample, check_space

JOB_CONFIGS: dict[str, type[PretrainConfig] | type[SftConfig]] = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
}
"""Kinds of runs by the job that reads them."""

SWEEP_OWNED_FIELDS = ("run_dir", "max_steps", "num_epochs", "stop_step", "plan")
"""Fields of a trial that the sweep sets."""

_UNSEARCHABLE_SECTIONS = ("scale", "checkpoint", "eval", "logging")

_NO_CLONES = (
    "which pauses and clones trials through Tune's checkpoints, and runs under Ray Train have none "
    "there"
)


@settings
class SearchConfig:
    """How samples are chosen."""

    kind: Literal["random", "grid", "tpe"] = "random"
    """Independent draws; every combination of a space of choices; or Optuna's tree-structured
    Parzen estimator, which learns from the trials that have ended."""

    seed: Annotated[int, Field(ge=0)] = 1
    """Decides the samples."""

    startup_trials: Annotated[int, Field(ge=1)] = 10
    """Random trials before `tpe` begins to learn."""


@settings
class SchedulerConfig:
    """Which trials are stopped early."""

    kind: str = "asha"
    """`none`, `asha` (asynchronous successive halving: at each rung, only the best
    1 / `reduction_factor` go on) or `median` (stopped where the best evaluation so far is worse
    than the median of the other trials' means)."""

    grace_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps before a trial may be stopped, the first rung; null: the first evaluation."""

    reduction_factor: Annotated[float, Field(gt=1)] = 3.0
    """Factor between the rungs' steps, and of trials that end at each; `asha` alone."""

    @model_validator(mode="after")
    def _check(self) -> "SchedulerConfig":
        if self.kind in {"pbt", "pb2", "hyperband", "bohb"}:
            raise ConfigError([f"kind: got {self.kind}, {_NO_CLONES}; use asha, median or none"])
        if self.kind not in {"none", "asha", "median"}:
            raise ConfigError([f"kind: got {self.kind!r}, wanted none, asha or median"])
        return self


@settings
class SweepConfig:
    """A search over settings of training runs."""

    sweep_dir: Annotated[str, Field(min_length=1), PLACEMENT]
    """Directory of the sweep, where the run directories of its trials lie too: on storage that
    every node mounts, or `s3://...`, `gs://...`. The same command with the same directory goes on
    where the sweep was."""

    job: Literal["pretrain", "sft"]
    """The job that a trial is a run of."""

    base: Annotated[str, Field(min_length=1), PLACEMENT]
    """Config file of that job; every trial is this with its sample, and is compared by content."""

    fixed: Annotated[dict[str, JsonValue], PLACEMENT, Field(default_factory=dict)]
    """Fields of `base` by their dotted paths, replaced in every trial."""

    space: dict[str, Distribution]
    """Fields of `base` by their dotted paths, and where their values come from."""

    search: SearchConfig = SearchConfig()
    """How samples are chosen."""

    scheduler: SchedulerConfig = SchedulerConfig()
    """Which trials are stopped early."""

    metric: Annotated[str, Field(min_length=1)] = "eval/loss"
    """What trials are compared by, as an evaluation names it: `eval/loss`, `eval/bits_per_byte`,
    or one source's, `eval/loss/NAME`."""

    mode: Literal["min", "max"] = "min"
    """Whether less or more of it is better."""

    max_steps: Annotated[int, Field(ge=1)]
    """Optimizer steps of a trial that is not stopped; also the horizon of its learning rate."""

    num_trials: Annotated[int | None, Field(ge=1), PLACEMENT] = None
    """Trials; may be raised later. null: all points of a grid."""

    max_concurrent: Annotated[int | None, Field(ge=1), PLACEMENT] = None
    """Trials at a time, at most; null: as many as the cluster can hold."""

    max_restarts: Annotated[int, Field(ge=0), PLACEMENT] = 3
    """How often a trial whose node was lost is started again, from its newest checkpoint."""

    @model_validator(mode="after")
    def _check(self) -> "SweepConfig":
        problems = check_space(self.space)
        for group, fields in (("space", self.space), ("fixed", flatten(self.fixed))):
            problems += [
                f"{group}.{field}: the sweep sets it; see {_replacement(field)}"
                for field in fields
                if field in SWEEP_OWNED_FIELDS
            ]
        problems += [
            f"space.{field}: says where or how a trial runs, not what it learns; put it into "
            "fixed, with one value"
            for field in self.space
            if field.partition(".")[0] in _UNSEARCHABLE_SECTIONS
        ]
        problems += [
            f"fixed.{field}: stands in the space too; leave one out"
            for field in flatten(self.fixed)
            if field in self.space
        ]
        if self.search.kind != "grid" and self.num_trials is None:
            problems.append(f"num_trials: required where search.kind is {self.search.kind}")
        grace = self.scheduler.grace_steps
        if self.scheduler.kind != "none" and grace is not None and grace >= self.max_steps:
            problems.append(
                f"scheduler.grace_steps: got {grace}, but a trial has {self.max_steps} steps "
                "(max_steps), so none would be stopped; lower it, or set scheduler.kind=none"
            )
        if problems:
            raise ConfigError(problems)
        return self

    @property
    def place(self) -> Place:
        """Where `sweep_dir` is."""
        return Place.parse(self.sweep_dir, "sweep_dir")


def _replacement(field: str) -> str:
    names = {"run_dir": "sweep_dir", "max_steps": "its own max_steps", "num_epochs": "max_steps"}
    return names.get(field, "the field of a single run")


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings as one, by dotted paths: `fixed.scale.num_workers=1` makes such."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves |= {f"{name}.{rest}": leaf for rest, leaf in flatten(value).items()}
        else:
            leaves[name] = value
    return leaves


def load_base(sweep: SweepConfig) -> AnyTrainConfig:
    """Read the base of a sweep, with what `fixed` replaces in it.

    Raises:
        ConfigError: all mistakes of the file and of `fixed`.
    """
    data, problems = read_mapping(Path(sweep.base))
    if data is None or problems:
        raise ConfigError([f"base: {line}" for line in problems])
    try:
        base = from_dict(JOB_CONFIGS[sweep.job], data)
    except ConfigError as error:
        raise ConfigError([f"base: {sweep.base}: {line}" for line in error.problems]) from None
    horizon = {"max_steps": sweep.max_steps, "num_epochs": None, "plan": False, "stop_step": None}
    try:
        return override(base, {**flatten(sweep.fixed), **horizon})
    except ConfigError as error:
        raise ConfigError([f"fixed: {line}" for line in error.problems]) from None


def build_trial_config(base: AnyTrainConfig, sample: TrialSample, run_dir: Place) -> AnyTrainConfig:
    """Return the whole config of a trial.

    Raises:
        ConfigError: the sample makes no legal config.
    """
    values: dict[str, Any] = {**sample, "run_dir": str(run_dir)}
    return override(base, values)
