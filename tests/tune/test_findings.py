"""What a sweep reports at its end; each command is parsed by the verb that it names."""

import random
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import load, to_yaml
from raytune_llama.merge.config import MergeConfig
from raytune_llama.serve.config import EndpointConfig, expand_model_dir
from raytune_llama.storage.files import OUTPUT_MANIFEST
from raytune_llama.storage.place import Place
from raytune_llama.train.config import PretrainConfig
from raytune_llama.tune.config import SweepConfig, load_base
from raytune_llama.tune.findings import (
    MIN_IMPORTANCE_TRIALS,
    Finding,
    count_states,
    describe_findings,
    find_edges,
    measure_importances,
)
from raytune_llama.tune.journal import TrialRecord, TrialState, trial_dir
from raytune_llama.tune.results import BEST_FILE, RESOLVED_SWEEP_FILE, write_best
from raytune_llama.tune.search import RandomSampler, check_samples
from tests.tune.conftest import MakeSweep

RATE = "optim.learning_rate"
RANK = "lora.rank"


def finished(sample: dict[str, Any], number: int = 0, value: float = 2.0) -> TrialRecord:
    return TrialRecord(number, sample, "finished", {4: 3.0, 12: value})


def describe(sweep: SweepConfig, *trials: TrialRecord) -> list[Finding]:
    """Return the findings of a sweep that wrote what its commands read."""
    base = load_base(sweep)
    (sweep.place / RESOLVED_SWEEP_FILE).write_bytes(to_yaml(sweep).encode())
    write_best(sweep, base, trials[0])
    return describe_findings(sweep, base, trials, measure_importances(sweep, base, trials))


def arguments(findings: list[Finding], *verbs: str) -> list[list[str]]:
    """Return the arguments of the commands of these verbs, as a shell splits them."""
    words = [shlex.split(finding.command) for finding in findings if finding.command]
    assert all(program == "raytune" for program, *_ in words)
    return [rest for _, verb, *rest in words if verb in verbs]


@pytest.mark.parametrize(
    ("field", "kind", "value", "wider"),
    [
        (RATE, {"loguniform": [1e-4, 1e-2]}, 9.8e-3, {"loguniform": (1e-4, 0.1)}),
        (RATE, {"loguniform": [1e-4, 1e-2]}, 1.1e-4, {"loguniform": (1e-5, 1e-2)}),
        (RATE, {"loguniform": [1e-4, 4e-4]}, 4e-4, {"loguniform": (1e-4, 1.6e-3)}),
        (RATE, {"uniform": [1e-4, 1e-2]}, 1e-4, {"uniform": (1e-5, 1e-2)}),
        ("lora.dropout", {"uniform": [0.1, 0.3]}, 0.105, {"uniform": (0.0, 0.3)}),
        ("lora.dropout", {"uniform": [0.1, 0.3]}, 0.295, {"uniform": (0.1, 0.5)}),
        ("optim.weight_decay", {"uniform": [0.0, 0.1]}, 0.1, {"uniform": (0.0, 0.2)}),
        (RANK, {"randint": [2, 16]}, 16, {"randint": (2, 30)}),
        (RANK, {"randint": [2, 16]}, 2, {"randint": (1, 16)}),
        (RANK, {"choice": [8, 2, 4]}, 8, {"choice": (8, 2, 4, 16)}),
        (RANK, {"choice": [2, 4, 8]}, 2, {"choice": (1, 2, 4, 8)}),
        (RANK, {"choice": [10, 20, 30]}, 30, {"choice": (10, 20, 30, 40)}),
        (
            "optim.weight_decay",
            {"choice": [0.0, 0.01, 0.02]},
            0.02,
            {"choice": (0, 0.01, 0.02, 0.03)},
        ),
    ],
)
def test_edge_of_a_range_that_can_be_wider_is_found(
    make_sweep: MakeSweep, field: str, kind: dict[str, Any], value: float, wider: dict[str, Any]
) -> None:
    sweep = make_sweep(space={field: kind})
    edges = find_edges(sweep, load_base(sweep), finished({field: value}))
    assert [edge.field for edge in edges] == [field]
    ((name, ends),) = wider.items()
    assert getattr(edges[0].wider, name) == pytest.approx(ends)
    assert f"{value:.4g}" in str(edges[0])


@pytest.mark.parametrize(
    ("field", "kind", "value"),
    [
        (RATE, {"loguniform": [1e-4, 1e-2]}, 1e-3),
        # In the outer 5 % of the values, but not of their logarithms.
        (RATE, {"loguniform": [1e-8, 1.0]}, 0.04),
        (RANK, {"randint": [2, 16]}, 15),
        (RANK, {"choice": [2, 4, 8]}, 4),
        # With two values or one, each is at an edge.
        (RANK, {"randint": [4, 5]}, 5),
        (RANK, {"choice": [4, 8]}, 8),
        (RANK, {"choice": [8]}, 8),
        # No order, or none that means anything.
        ("schedule.kind", {"choice": ["constant", "cosine", "linear"]}, "linear"),
        ("lora.rslora", {"choice": [False, True]}, True),
        ("lora.targets", {"choice": [["q_proj"], ["k_proj"], ["v_proj"]]}, ["v_proj"]),
        ("seed", {"randint": [1, 9]}, 9),
        # The edge is the limit of the field.
        ("lora.dropout", {"uniform": [0.0, 0.3]}, 0.0),
        ("optim.weight_decay", {"choice": [0.0, 0.01, 0.02]}, 0.0),
        (RANK, {"randint": [1, 16]}, 1),
    ],
)
def test_edge_is_not_found_where_a_wider_range_has_no_meaning(
    make_sweep: MakeSweep, field: str, kind: dict[str, Any], value: object
) -> None:
    sweep = make_sweep(space={field: kind})
    assert find_edges(sweep, load_base(sweep), finished({field: value})) == []


def test_edge_of_a_range_below_a_limit_is_widened_within_it(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(space={"optim.beta2": {"uniform": [0.9, 0.99]}})
    (edge,) = find_edges(sweep, load_base(sweep), finished({"optim.beta2": 0.9899}))
    assert edge.wider.uniform is not None
    assert 0.99 < edge.wider.uniform[1] < 1


def test_widening_command_starts_a_sweep_with_the_wider_ranges_and_all_else_equal(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    sweep = make_sweep(sweep_dir=str(tmp_path / "my sweep, #2"), fixed={"seed": 7})
    best = finished({RATE: 0.099, RANK: 2, "lora.alpha": 4})
    ((arguments_of_sweep),) = arguments(describe(sweep, best), "sweep")
    wider = load(SweepConfig, arguments_of_sweep)
    assert wider.place != sweep.place
    assert wider.space[RATE].loguniform == (1e-4, 1.0)
    assert wider.space[RANK].choice == (1, 2, 4, 8)
    assert wider.space["lora.alpha"] == sweep.space["lora.alpha"]
    assert (wider.fixed, wider.num_trials, wider.base) == ({"seed": 7}, 6, sweep.base)
    assert len(check_samples(wider, load_base(wider))) == 6


def test_winner_at_no_edge_has_no_command_that_widens(make_sweep: MakeSweep) -> None:
    best = finished({RATE: 3e-3, RANK: 4, "lora.alpha": 8})
    assert arguments(describe(make_sweep(), best), "sweep") == []


def test_counts_name_every_state_and_the_trials_that_have_not_started(
    make_sweep: MakeSweep,
) -> None:
    states: list[TrialState] = ["finished", "stopped", "stopped", "diverged", "failed", "running"]
    trials = [TrialRecord(n, {}, state) for n, state in enumerate(states)]
    text = count_states(make_sweep(num_trials=9), trials)
    assert text.startswith("9 trials")
    for part in ("1 finished", "2 stopped", "1 diverged", "1 failed", "1 not ended", "3 not start"):
        assert part in text
    assert "not started" not in count_states(make_sweep(num_trials=4), trials)


def test_sweep_without_a_score_reports_its_counts_alone(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(num_trials=1)
    failed = TrialRecord(0, {RATE: 0.1, RANK: 2, "lora.alpha": 4}, "failed", cause="no model")
    base = load_base(sweep)
    found = describe_findings(sweep, base, [failed], measure_importances(sweep, base, [failed]))
    assert [(str(finding), finding.command) for finding in found] == [
        (count_states(sweep, [failed]), None)
    ]


def write_result(sweep: SweepConfig, number: int, name: str) -> str:
    result = trial_dir(sweep.place, number) / name
    (result / OUTPUT_MANIFEST).write_json({})
    return str(result)


def test_winner_with_an_adapter_is_merged_served_and_trained_further_from_it(
    make_sweep: MakeSweep, tmp_path: Path
) -> None:
    sweep = make_sweep(sweep_dir=str(tmp_path / "my sweep"), fixed={"seed": 7})
    adapter = write_result(sweep, 3, "pt_lora_model")
    best = finished({RATE: 3e-3, RANK: 4, "lora.alpha": 8}, number=3)
    found = describe(sweep, best)
    assert any(adapter in finding.text for finding in found)

    (merging,) = arguments(found, "merge")
    merge = load(MergeConfig, merging)
    assert (merge.base, merge.adapters) == (load_base(sweep).model.path, (adapter,))
    (serving,) = arguments(found, "serve")
    assert load(EndpointConfig, expand_model_dir(serving)).models[0].path == merge.target

    further, longer = (load(PretrainConfig, given) for given in arguments(found, "pretrain"))
    assert (further.adapter, further.lora, further.max_steps) == (adapter, None, 12)
    assert further.seed != 7
    assert (longer.max_steps, longer.stop_step, longer.seed) == (24, None, 7)
    assert longer.lora is not None
    assert longer.lora.rank == 4
    assert {further.optim.learning_rate, longer.optim.learning_rate} == {3e-3}
    assert len({further.run_dir, longer.run_dir, str(sweep.place / "best")}) == 3


def test_winner_in_object_storage_has_commands_on_local_copies(
    make_sweep: MakeSweep, s3_path: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(sweep_dir=str(s3_path / "sweep"))
    adapter = write_result(sweep, 0, "pt_lora_model")
    found = describe(sweep, finished({RATE: 0.099, RANK: 4, "lora.alpha": 8}))
    assert any("copy" in finding.text and str(sweep.place) in finding.text for finding in found)
    assert any(adapter in finding.text for finding in found)
    for name in (RESOLVED_SWEEP_FILE, BEST_FILE):
        (tmp_path / name).write_bytes((sweep.place / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    (widening,), (merging,) = arguments(found, "sweep"), arguments(found, "merge")
    wider = load(SweepConfig, widening)
    assert (wider.sweep_dir, wider.space[RATE].loguniform) == (
        str(s3_path / "sweep-wider"),
        (1e-4, 1.0),
    )
    assert load(MergeConfig, merging).adapters == ("pt_lora_model",)
    further, _ = (load(PretrainConfig, given) for given in arguments(found, "pretrain"))
    assert (further.adapter, further.run_place) == ("pt_lora_model", sweep.place / "continued")


def test_winner_of_full_training_is_served_and_trained_further_as_a_model(
    make_sweep: MakeSweep,
) -> None:
    fixed = {"train": "full", "lora": None}
    sweep = make_sweep(space={RATE: {"loguniform": [1e-5, 1e-1]}}, fixed=fixed)
    model = write_result(sweep, 0, "pt_model")
    found = describe(sweep, finished({RATE: 1e-3}))
    assert arguments(found, "merge") == []
    assert arguments(found, "serve") == [[f"model_dir={model}"]]
    further, _ = (load(PretrainConfig, given) for given in arguments(found, "pretrain"))
    assert (further.model.path, further.train, further.adapter) == (model, "full", None)


def test_winner_that_was_stopped_early_is_finished_from_its_own_run(make_sweep: MakeSweep) -> None:
    sweep = make_sweep()
    best = TrialRecord(3, {RATE: 3e-3, RANK: 4, "lora.alpha": 8}, "stopped", {4: 3.0, 8: 2.0})
    found = describe(sweep, best)
    assert arguments(found, "merge", "serve") == []
    finishing, longer = arguments(found, "pretrain")
    assert finishing == [str(trial_dir(sweep.place, 3) / "run.yaml")]
    again = load(PretrainConfig, longer)
    assert (again.max_steps, again.stop_step) == (24, None)


def many(sweep: SweepConfig, count: int) -> list[TrialRecord]:
    """Return trials whose loss follows the learning rate alone."""
    rates = [10 ** -(1 + 3 * n / count) for n in range(count)]
    ranks = [(2, 4, 8)[n % 3] for n in range(count)]
    return [
        finished({RATE: rate, RANK: rank, "lora.alpha": 2 * rank}, n, abs(rate - 1e-3))
        for n, (rate, rank) in enumerate(zip(rates, ranks, strict=True))
    ]


def test_importance_finds_the_field_that_decides(make_sweep: MakeSweep) -> None:
    sweep = make_sweep()
    trials = many(sweep, MIN_IMPORTANCE_TRIALS)
    found = measure_importances(sweep, load_base(sweep), trials)
    assert list(found.shares) == [RATE, RANK]
    assert found.shares[RATE] > 0.7
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.by_chance == {RANK}


def test_importance_of_a_metric_to_maximize_is_that_of_its_best_trials(
    make_sweep: MakeSweep,
) -> None:
    lowest, highest = make_sweep(), make_sweep(mode="max")
    trials = many(lowest, 30)
    opposite = [replace(trial, values={12: -trial.values[12]}) for trial in trials]
    base = load_base(lowest)
    assert measure_importances(highest, base, opposite) == measure_importances(lowest, base, trials)


def test_importance_of_scores_that_no_field_decides_is_refused(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(num_trials=40)
    base = load_base(sweep)
    refused = 0
    for seed in range(20):
        scores = random.Random(seed)
        sampler = RandomSampler(sweep.space, seed)
        trials = [finished(sampler.sample(n), n, scores.random()) for n in range(40)]
        found = measure_importances(sweep, base, trials)
        refused += found.shares == {}
        assert (found.reason is None) == (found.shares != {})
    # One in 20 is to be expected; five or more are less likely than 0.3 %.
    assert refused > 15


def test_importance_of_equal_scores_is_refused(make_sweep: MakeSweep) -> None:
    sweep = make_sweep()
    trials = [replace(trial, values={12: 2.0}) for trial in many(sweep, 30)]
    assert measure_importances(sweep, load_base(sweep), trials).shares == {}


@pytest.mark.parametrize("count", [1, 8, MIN_IMPORTANCE_TRIALS - 1])
def test_importance_of_too_few_trials_is_refused_with_both_numbers(
    make_sweep: MakeSweep, count: int
) -> None:
    sweep = make_sweep()
    failed = TrialRecord(99, {RATE: 1.0, RANK: 2, "lora.alpha": 4}, "failed", {4: 1.0})
    found = measure_importances(sweep, load_base(sweep), [*many(sweep, count), failed])
    assert found.shares == {}
    assert f"{count} of {MIN_IMPORTANCE_TRIALS}" in str(found)


@pytest.mark.parametrize("other", [{}, {RANK: {"choice": [4]}}])
def test_importance_of_a_single_varying_field_is_refused(
    make_sweep: MakeSweep, other: dict[str, Any]
) -> None:
    sweep = make_sweep(space={RATE: {"loguniform": [1e-4, 1e-1]}, **other})
    trials = [
        finished({**trial.sample, RANK: 4}, trial.number, trial.step) for trial in many(sweep, 99)
    ]
    found = measure_importances(sweep, load_base(sweep), trials)
    assert found.shares == {}
    assert "one field" in str(found)
