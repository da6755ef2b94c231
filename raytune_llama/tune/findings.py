"""What a sweep found: how its trials ended, what to widen, what mattered, and what to run next.

`describe_findings` is what the job prints at its end and what `sweep.html` shows.
"""

import math
import random
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_llama.config.settings import ConfigError, to_dict
from raytune_llama.config.yaml12 import format_value
from raytune_llama.storage.files import OUTPUT_MANIFEST
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint.layout import list_checkpoints
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.export import result_path
from raytune_llama.train.identity import RUN_CONFIG_FILE, continuation_overrides
from raytune_llama.train.monitoring.metrics import (
    EVAL_TEXT_BITS_PER_BYTE,
    describe_accuracy_change,
    describe_text_change,
    is_accuracy,
)
from raytune_llama.tune.config import SweepConfig, build_trial_config
from raytune_llama.tune.journal import TrialRecord, trial_dir
from raytune_llama.tune.results import (
    BEST_FILE,
    RESOLVED_SWEEP_FILE,
    check_trial,
    find_best,
    score_trial,
)
from raytune_llama.tune.search import build_study, count_trials, optuna_distributions
from raytune_llama.tune.space import (
    Distribution,
    Side,
    complete_sample,
    drawn_parameters,
    format_sample,
    widen,
)

STATE_NAMES = {
    "finished": "finished",
    "stopped": "stopped early",
    "diverged": "diverged",
    "failed": "failed",
    "running": "not ended",
}
"""What the states of trials are called in a summary, in its order."""

TOP_FRACTION = 0.25
"""Fraction of the trials that count as the best for importances."""

MIN_IMPORTANCE_TRIALS = 20
"""Fewest trials with a score for importances: the best `TOP_FRACTION` are 5 then, the fewest that
Optuna recommends for PED-ANOVA, which estimates the distribution of their values. In simulations,
the only field of four that had an effect came first in 97 of 100 sweeps of 20 trials, in 81 of 10
trials and in 65 of 5."""

SIGNIFICANCE = 0.05
"""Probability that some field without any effect is reported to have one."""


@dataclass(frozen=True)
class Finding:
    """One thing that a sweep found, and the command that acts on it."""

    text: str
    """Statement for the user, on one line."""

    command: str | None = None
    """Command line for a shell, complete; None if there is nothing to run."""

    def __str__(self) -> str:
        return self.text if self.command is None else f"{self.text}\n  {self.command}"


@dataclass(frozen=True)
class Edge:
    """A field whose best value is at the edge of its range, and a wider range for it."""

    field: str
    """Dotted field of the space."""

    value: Any
    """Value of the best trial."""

    side: Side
    """Edge of the range."""

    kind: Distribution
    """Distribution of the sweep."""

    wider: Distribution
    """Distribution that extends beyond the edge, within what the field accepts."""

    def __str__(self) -> str:
        numbers = self.kind.numeric_choices
        if numbers:
            extreme = "smallest" if self.side == "lower" else "largest"
            return f"{self.field} {_number(self.value)} is the {extreme} of its choices: add others"
        low, high = self.kind.loguniform or self.kind.uniform or self.kind.randint or (0, 1)
        return (
            f"{self.field} {_number(self.value)} is at the {self.side} edge of its range, "
            f"{_number(low)} to {_number(high)}: widen it"
        )


@dataclass(frozen=True)
class Importances:
    """Importance of each field of the space for the score."""

    shares: Mapping[str, float]
    """Share of each field, which sum to 1, the largest first; empty if nothing can be said."""

    by_chance: frozenset[str]
    """Fields whose share is no larger than chance would often give."""

    num_trials: int
    """Number of trials that have a score."""

    reason: str | None
    """Why nothing can be said; None if something can."""

    def __str__(self) -> str:
        if self.reason is not None:
            return f"importance: {self.reason}"
        shares = ", ".join(
            f"{field} {share:.0%}{' (may be chance)' if field in self.by_chance else ''}"
            for field, share in self.shares.items()
        )
        return f"importance, from {self.num_trials} trials: {shares}"


def describe_findings(
    sweep: SweepConfig,
    base: AnyTrainConfig,
    trials: Sequence[TrialRecord],
    importances: Importances,
) -> list[Finding]:
    """Return what a sweep found.

    Args:
        sweep: config of the sweep.
        base: config of every trial, without its sample, with absolute paths.
        trials: trials, best first.
        importances: importances of the fields, from `measure_importances`.
    """
    found = [Finding(count_states(sweep, trials))]
    found += describe_violations(sweep, base, trials)
    best = find_best(sweep, base, trials)
    if best is None:
        return found
    found.append(Finding(f"best: {_describe_score(sweep, base, best)}"))
    found += describe_changes(sweep, base, best)
    if not sweep.place.is_local:
        found.append(
            Finding(
                "the commands below read local files: first copy the files and folders that they "
                f"name from {sweep.place} to the current folder"
            )
        )
    edges = find_edges(sweep, base, best)
    found += [Finding(str(edge)) for edge in edges[:-1]]
    if edges:
        found.append(Finding(str(edges[-1]), _wider_command(sweep, edges)))
    found.append(Finding(str(importances)))
    return found + describe_winner(sweep, base, best)


def _describe_score(sweep: SweepConfig, base: AnyTrainConfig, trial: TrialRecord) -> str:
    score = score_trial(trial, base, sweep.mode)
    assert score is not None
    step, value = score
    sample = format_sample(trial.sample)
    return f"trial {trial.number}, {sweep.metric} {value:.4f} at step {step} ({sample})"


def describe_violations(
    sweep: SweepConfig, base: AnyTrainConfig, trials: Sequence[TrialRecord]
) -> list[Finding]:
    """Return how many trials violate a constraint and, if all do, which is the nearest.

    Args:
        sweep: config of the sweep.
        base: config of every trial, without its sample.
        trials: trials, best first.
    """
    scored = [trial for trial in trials if score_trial(trial, base, sweep.mode)]
    violating = [trial for trial in scored if check_trial(sweep, base, trial)]
    if not violating:
        return []
    count = f"{len(violating)} of {len(scored)} trials with a score violate a constraint"
    if len(violating) < len(scored):
        return [Finding(f"{count}, and none of them is the best")]
    nearest = violating[0]
    violated = "; ".join(map(str, check_trial(sweep, base, nearest)))
    return [
        Finding(
            f"{count}, so there is no best trial and no {BEST_FILE}; the nearest is "
            f"{_describe_score(sweep, base, nearest)}: {violated}"
        )
    ]


def describe_changes(sweep: SweepConfig, base: AnyTrainConfig, best: TrialRecord) -> list[Finding]:
    """Return how the best trial's tuning has changed `eval.texts` and the results of tasks."""
    score = score_trial(best, base, sweep.mode)
    assert score is not None
    before, after = (best.others.get(step, {}) for step in (0, score[0]))
    found: list[Finding] = []
    old, new = (values.get(EVAL_TEXT_BITS_PER_BYTE) for values in (before, after))
    if new is not None:
        text = f"the best trial's {describe_text_change(old, new)}"
        is_limited = EVAL_TEXT_BITS_PER_BYTE in {sweep.metric, *sweep.constraints}
        if old is not None and new > old and not is_limited:
            text += f"; constraints.{EVAL_TEXT_BITS_PER_BYTE}.max limits it in a new sweep"
        found.append(Finding(text))
    return found + [
        Finding(f"the best trial's {describe_accuracy_change(name, before.get(name), value)}")
        for name, value in after.items()
        if is_accuracy(name)
    ]


def count_states(sweep: SweepConfig, trials: Sequence[TrialRecord]) -> str:
    """Return how many trials a sweep has in each state, as one line."""
    total = max(count_trials(sweep), len(trials))
    counts = {name: sum(t.state == state for t in trials) for state, name in STATE_NAMES.items()}
    counts["not started"] = total - len(trials)
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{total} trials of up to {sweep.max_steps} steps: {parts}"


def find_edges(sweep: SweepConfig, base: AnyTrainConfig, best: TrialRecord) -> list[Edge]:
    """Return the fields whose best value is at an edge of the range that can be widened.

    An edge that is the field's own limit, as a dropout of 0, is none.
    """
    found: list[Edge] = []
    for field, kind in sweep.space.items():
        # The numbers of a seed have no order that means anything.
        side = None if field == "seed" else kind.find_edge(best.sample[field])
        for value, wider in widen(kind, side) if side else ():
            sample = complete_sample(sweep.space, {**best.sample, field: value})
            try:
                build_trial_config(base, sample, trial_dir(sweep.place, best.number))
            except ConfigError:
                continue
            assert side is not None
            found.append(Edge(field, best.sample[field], side, kind, wider))
            break
    return found


def _wider_command(sweep: SweepConfig, edges: Sequence[Edge]) -> str:
    place = sweep.place
    wider = {
        f"space.{edge.field}": {
            name: value
            for name, value in to_dict(edge.wider).items()
            if value is not None and name != "factor"
        }
        for edge in edges
    }
    target = str(place.with_name(f"{place.name}-wider"))
    file = place / RESOLVED_SWEEP_FILE
    return _command("sweep", file, {"sweep_dir": target, **wider})


def measure_importances(
    sweep: SweepConfig, base: AnyTrainConfig, trials: Sequence[TrialRecord]
) -> Importances:
    """Compute the importance of each field of the space for the score, if that says anything.

    Uses PED-ANOVA (Watanabe, Bansal, Hutter 2023) on the trials that have a score. Stopped trials
    count like the others, by the score that they reached.
    """
    scored = [
        (trial, found[1]) for trial in trials if (found := score_trial(trial, base, sweep.mode))
    ]
    varying = [
        field
        for field, kind in sweep.space.items()
        if kind.multiple_of is None and len(kind.choice or (0, 1)) > 1
    ]
    reason = None
    if len(varying) < 2:
        reason = "only one field varies, so there is nothing to compare"
    elif len(scored) < MIN_IMPORTANCE_TRIALS:
        reason = f"too few trials to say ({len(scored)} of {MIN_IMPORTANCE_TRIALS} needed)"
    if reason is not None:
        return Importances({}, frozenset(), len(scored), reason)
    parts, by_chance = _compute_divergences(sweep, scored, varying)
    if by_chance == set(varying):
        reason = f"no field matters more than chance would show in {len(scored)} trials"
        return Importances({}, frozenset(), len(scored), reason)
    total = sum(parts.values())
    shares = {field: part / total for field, part in parts.items()}
    return Importances(shares, by_chance, len(scored), None)


def _compute_divergences(
    sweep: SweepConfig, scored: Sequence[tuple[TrialRecord, float]], varying: Sequence[str]
) -> tuple[dict[str, float], frozenset[str]]:
    """Return each field's divergence between the best trials and all, the largest first.

    Also returns the fields whose divergence is no larger than shuffled scores often give: shares
    sum to 1 even if no field has any effect. The significance level of all fields together is
    `SIGNIFICANCE`.
    """
    from optuna.exceptions import ExperimentalWarning
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.trial import create_trial

    study = build_study(sweep.space, "min", [])
    distributions = optuna_distributions(sweep.space)
    for trial, value in scored:
        params = drawn_parameters(sweep.space, trial.sample)
        study.add_trial(create_trial(params=params, distributions=distributions, value=value))
    sign = 1.0 if sweep.mode == "min" else -1.0
    scores = [sign * value for _, value in scored]
    num_shuffles = math.ceil(2 * len(varying) / SIGNIFICANCE) - 1
    generator = random.Random(0)  # no secret
    exceeded = dict.fromkeys(varying, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # It warns that a target is minimized, and of equal scores.
        warnings.simplefilter("ignore", UserWarning)
        evaluator = PedAnovaImportanceEvaluator(target_quantile=TOP_FRACTION)
        parts = evaluator.evaluate(study, list(varying), target=lambda t: scores[t.number])
        for _ in range(num_shuffles):
            shuffled = generator.sample(scores, len(scores))
            chance = evaluator.evaluate(study, list(varying), target=lambda t: shuffled[t.number])  # noqa: B023
            for field in varying:
                exceeded[field] += chance[field] >= parts[field]
    limit = SIGNIFICANCE / len(varying) * (num_shuffles + 1)
    return parts, frozenset(field for field in varying if exceeded[field] > limit)


def describe_winner(sweep: SweepConfig, base: AnyTrainConfig, best: TrialRecord) -> list[Finding]:
    """Return where the best trial's result is, and commands that use it and train it further."""
    config = build_trial_config(base, best.sample, trial_dir(sweep.place, best.number))
    result = result_path(config)
    is_adapter = config.train == "lora"
    kind = "adapter" if is_adapter else "model"
    if (result / OUTPUT_MANIFEST).status() is None:
        return [*_describe_unfinished(sweep, config, best, kind), _longer(sweep, best)]
    found = [Finding(f"the best trial's {kind} is in {result}")]
    used = _local(result)
    if is_adapter:
        target = _local(sweep.place / "merged")
        values = {"base": config.model.path, "adapters": [used], "target": target}
        found.append(Finding("merge it into its base:", _command("merge", None, values)))
        found.append(
            Finding("serve it after that:", _command("serve", None, {"model_dir": target}))
        )
    else:
        found.append(Finding("serve it:", _command("serve", None, {"model_dir": used})))
    return [*found, *_continued(sweep, config, best, used), _longer(sweep, best)]


def _describe_unfinished(
    sweep: SweepConfig, config: AnyTrainConfig, best: TrialRecord, kind: str
) -> list[Finding]:
    """Describe how to finish a trial that ended before its last step, and so has no result."""
    saved = list_checkpoints(config.run_place)
    start = f"from {saved[-1].name}" if saved else "from its start, since no checkpoint was saved"
    file = config.run_place / RUN_CONFIG_FILE
    text = (
        f"the best trial has no {kind}, since it has {STATE_NAMES[best.state]} at step {best.step} "
        f"of {sweep.max_steps}; its config is {file}; finish it {start}:"
    )
    if best.state == "running":
        text = f"the best trial has no {kind} yet; the same command resumes the sweep"
        return [Finding(text)]
    if best.state == "finished":
        text = f"the best trial's {kind} is no longer in {config.run_place}; make it again {start}:"
    return [Finding(text, _command(sweep.job, file, {}))]


def _continued(
    sweep: SweepConfig, config: AnyTrainConfig, best: TrialRecord, result: str
) -> list[Finding]:
    """Return the command that trains a result further, as a run of its own."""
    if config.train == "embeddings":
        return []  # The vocabulary's new rows are new only once.
    values = {
        **continuation_overrides(config, result),
        **_whole_schedule(sweep, best),
        "run_dir": str(sweep.place / "continued"),
    }
    return [
        Finding(
            f"train it for {sweep.max_steps} more steps, with a new schedule and another order of "
            "the data:",
            _command(sweep.job, sweep.place / BEST_FILE, values),
        )
    ]


def _longer(sweep: SweepConfig, best: TrialRecord) -> Finding:
    """Return the command that repeats a trial from its start, with twice the steps."""
    steps = 2 * sweep.max_steps
    values = {
        "max_steps": steps,
        **_whole_schedule(sweep, best),
        "run_dir": str(sweep.place / f"best-{steps}"),
    }
    return Finding(
        f"train it from the start for {steps} steps instead of {sweep.max_steps}, with the "
        "schedule spread over them:",
        _command(sweep.job, sweep.place / BEST_FILE, values),
    )


def _whole_schedule(sweep: SweepConfig, best: TrialRecord) -> dict[str, None]:
    """Return the override that undoes the `stop_step` of `best.yaml`, if it has one."""
    return {"stop_step": None} if best.step < sweep.max_steps else {}


def _local(place: Place) -> str:
    """Return the path of a file, or of its copy in the current folder."""
    return str(place) if place.is_local else place.name


def _command(verb: str, file: Place | None, values: Mapping[str, Any]) -> str:
    """Return a command line of `raytune` that a POSIX shell accepts."""
    words = ["raytune", verb, *([_local(file)] if file else [])]
    words += [f"{field}={format_value(value)}" for field, value in values.items()]
    return shlex.join(words)


def _number(value: Any) -> str:  # noqa: ANN401
    return f"{value:.4g}" if isinstance(value, float) else str(value)
