"""The config of a sweep."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from raytune_llama.config.command_line import default_config, describe_other_job
from raytune_llama.config.settings import PLACEMENT, ConfigError, from_dict, override, settings
from raytune_llama.config.yaml12 import read_mapping
from raytune_llama.train.config import AnyTrainConfig, PretrainConfig, SftConfig
from raytune_llama.tune.constraints import Constraint
from raytune_llama.tune.space import Distribution, TrialSample, check_space

if TYPE_CHECKING:
    from raytune_llama.storage.place import Place

JOB_CONFIGS: dict[str, type[PretrainConfig] | type[SftConfig]] = {
    "pretrain": PretrainConfig,
    "sft": SftConfig,
}
"""Config classes of training jobs, by job name."""

SWEEP_OWNED_FIELDS = ("run_dir", "max_steps", "num_epochs", "stop_step", "plan")
"""Fields of a trial's config that the sweep sets."""

_UNSEARCHABLE_SECTIONS = ("scale", "checkpoint", "eval", "logging")

_NO_CLONES = (
    "which pauses and clones trials through Tune checkpoints, but Ray Train runs write none"
)


@settings
class SearchConfig:
    """Settings of the search algorithm, which chooses the samples."""

    kind: Literal["random", "grid", "tpe"] = "random"
    """`random`: independent draws; `grid`: every combination of a space of choices; `tpe`: Optuna's
    tree-structured Parzen estimator, which learns from the trials that have ended."""

    seed: Annotated[int, Field(ge=0)] = 1
    """Seed of the samples."""

    startup_trials: Annotated[int, Field(ge=1)] = 10
    """Number of random trials before `tpe` starts to learn."""


@settings
class SchedulerConfig:
    """Settings for stopping trials early."""

    kind: str = "asha"
    """`none`, `asha` (asynchronous successive halving: at each rung, only the best
    1 / `reduction_factor` continue) or `median` (a trial stops if its best evaluation so far is
    worse than the median of the other trials' means)."""

    grace_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps before a trial may be stopped, the first rung; null: the first evaluation."""

    reduction_factor: Annotated[float, Field(gt=1)] = 3.0
    """Ratio of steps from rung to rung, and of trials to survivors at each; `asha` only."""

    @model_validator(mode="after")
    def _check(self) -> "SchedulerConfig":
        if self.kind in {"pbt", "pb2", "hyperband", "bohb"}:
            raise ConfigError([f"kind: got {self.kind}, {_NO_CLONES}; use asha, median or none"])
        if self.kind not in {"none", "asha", "median"}:
            raise ConfigError([f"kind: got {self.kind!r}, wanted none, asha or median"])
        return self


@settings
class SweepConfig:
    """Config of a hyperparameter search over training runs."""

    sweep_dir: Annotated[str, Field(min_length=1), PLACEMENT]
    """Directory of the sweep and of its trials' run directories: on storage that every node mounts,
    or `s3://...`, `gs://...`. The same command with the same directory resumes the sweep."""

    job: Literal["pretrain", "sft"]
    """Training job that each trial runs."""

    base: Annotated[str, Field(min_length=1), PLACEMENT]
    """Config file of that job, to which each trial applies its sample: a path, or the name of one
    of the demo's, `sft_smollm2.yaml`. A resumed sweep compares its content, not its path."""

    fixed: Annotated[dict[str, JsonValue], PLACEMENT, Field(default_factory=dict)]
    """Fields of `base` to override in every trial, by dotted path."""

    space: dict[str, Distribution]
    """Fields of `base` to search over, by dotted path, with their distributions."""

    search: SearchConfig = SearchConfig()
    """Search algorithm."""

    scheduler: SchedulerConfig = SchedulerConfig()
    """Early stopping of trials."""

    metric: Annotated[str, Field(min_length=1)] = "eval/loss"
    """Metric by which trials are compared: `eval/loss`, `eval/bits_per_byte`, the loss of one
    source, `eval/loss/NAME`, `eval/text/bits_per_byte` of the base's `eval.texts`, or
    `eval/NAME/accuracy` of its `eval.tasks` (with `mode: max`)."""

    mode: Literal["min", "max"] = "min"
    """Whether a lower or a higher metric is better."""

    constraints: Annotated[dict[str, Constraint], Field(default_factory=dict)]
    """Bounds of metrics, such as `{eval/text/bits_per_byte: {max: 0.9}}`. A trial whose result
    violates one is not the best, whatever its metric: without a trial that meets all of them, the
    sweep fails and has no `best.yaml`. `tpe` prefers samples that meet them. For early stopping, an
    evaluation that violates one is worse than all that don't."""

    max_steps: Annotated[int, Field(ge=1)]
    """Optimizer steps of a trial that is not stopped early; also the horizon of its learning rate
    schedule."""

    num_trials: Annotated[int | None, Field(ge=1), PLACEMENT] = None
    """Number of trials; may be raised later. null: all points of a grid."""

    max_concurrent: Annotated[int | None, Field(ge=1), PLACEMENT] = None
    """Maximum number of concurrent trials; null: as many as the nodes can hold when the sweep
    starts. Where nodes are added on demand, set it: trials that do not fit yet wait for them."""

    pack: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"] | None, PLACEMENT] = None
    """Number of trials that train at once on one base model, in one group of workers that starts
    once for the whole sweep; `auto`: as many as fit into memory by its estimate. Each trial learns
    what it would learn alone; a new one takes the place of one that ends. Needs new LoRA adapters
    with `engine.strategy: ddp`. Null: each trial has workers and a base of its own."""

    max_restarts: Annotated[int, Field(ge=0), PLACEMENT] = 3
    """Maximum restarts of a trial whose node was lost, each from its newest checkpoint. In a pack,
    workers restart as `scale.max_failures` of the base config says."""

    plan: Annotated[bool, PLACEMENT] = False
    """Print the number of trials and the memory of packs of several sizes, and start nothing."""

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
            f"space.{field}: affects where or how a trial runs, not what it learns; move it to "
            "fixed, with one value"
            for field in self.space
            if field.partition(".")[0] in _UNSEARCHABLE_SECTIONS
        ]
        problems += [
            f"fixed.{field}: also in space; remove one of them"
            for field in flatten(self.fixed)
            if field in self.space
        ]
        if self.search.kind != "grid" and self.num_trials is None:
            problems.append(f"num_trials: required if search.kind is {self.search.kind}")
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
    def place(self) -> "Place":
        """Location of `sweep_dir`."""
        from raytune_llama.storage.place import Place

        return Place.parse(self.sweep_dir, "sweep_dir")


def _replacement(field: str) -> str:
    names = {"run_dir": "sweep_dir", "max_steps": "its own max_steps", "num_epochs": "max_steps"}
    return names.get(field, "the field of a single run")


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested mappings, as `fixed.scale.num_workers=1` creates, to one by dotted path."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves |= {f"{name}.{rest}": leaf for rest, leaf in flatten(value).items()}
        else:
            leaves[name] = value
    return leaves


def load_base(sweep: SweepConfig) -> AnyTrainConfig:
    """Load the base config of a sweep, with `fixed` applied.

    Raises:
        ConfigError: lists every mistake in the file or in `fixed`.
    """
    path = Path(sweep.base)
    # The name alone means one that ships with the package, unless there is such a file here.
    shipped = default_config(sweep.base) if path.name == sweep.base else path
    data, problems = read_mapping(shipped if shipped.is_file() and not path.is_file() else path)
    if data is None or problems:
        raise ConfigError([f"base: {line}" for line in problems])
    try:
        base = from_dict(JOB_CONFIGS[sweep.job], data)
    except ConfigError as error:
        other = describe_other_job(data, error.problems, sweep.job, JOB_CONFIGS)
        problems = error.problems if other is None else [f"{other}; set job to that"]
        raise ConfigError([f"base: {sweep.base}: {line}" for line in problems]) from None
    horizon = {"max_steps": sweep.max_steps, "num_epochs": None, "plan": False, "stop_step": None}
    try:
        return override(base, {**flatten(sweep.fixed), **horizon})
    except ConfigError as error:
        raise ConfigError([f"fixed: {line}" for line in error.problems]) from None


def build_trial_config(
    base: AnyTrainConfig, sample: TrialSample, run_dir: "Place"
) -> AnyTrainConfig:
    """Return the complete config of a trial.

    Raises:
        ConfigError: the sample yields an invalid config.
    """
    values: dict[str, Any] = {**sample, "run_dir": str(run_dir)}
    return override(base, values)
