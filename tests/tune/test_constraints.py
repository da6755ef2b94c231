"""Promise: a trial that violates a constraint is never the best, and the sweep says so."""

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError, identity, override, to_dict
from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.identity import IDENTITY_FILE, check_identity, identify
from raytune_llama.train.tasks import open_tasks
from raytune_llama.tune.config import SweepConfig, load_base
from raytune_llama.tune.constraints import Constraint, find_violations
from raytune_llama.tune.display import build_trial_table, format_trial_line
from raytune_llama.tune.findings import describe_findings, measure_importances
from raytune_llama.tune.journal import Journal, TrialRecord
from raytune_llama.tune.metric_checks import check_metrics, evaluation_interval, watched_metrics
from raytune_llama.tune.plot import write_page
from raytune_llama.tune.results import find_best, rank_trials, write_leaderboard
from raytune_llama.tune.scheduler import build_scheduler, replay_journal
from raytune_llama.tune.search import build_sampler
from raytune_llama.tune.sweep import check_sweep, identify_sweep
from raytune_llama.tune.trial import EvaluationReader, compute_objective
from tests.tune.conftest import MakeSweep
from tests.tune.test_scheduler import begin, tell
from tests.tune.test_trial import write

TEXT = "eval/text/bits_per_byte"
LIMITED = {"constraints": {TEXT: {"max": 0.9}}, "fixed": {"eval.texts": [{"path": "held_out.txt"}]}}


def trial(number: int, loss: float, text: float | None, rate: float = 1e-3) -> TrialRecord:
    sample = {"optim.learning_rate": rate, "lora.rank": 4, "lora.alpha": 8}
    others: dict[int, dict[str, float | None]] = {
        0: {TEXT: 0.872},
        4: {TEXT: 0.88},
        12: {TEXT: text},
    }
    return TrialRecord(number, sample, "finished", {4: 3.0, 12: loss}, others)


FORGETTING = trial(0, 0.39, 1.543)
WINNER = trial(1, 0.61, 0.897)
WORSE = trial(2, 0.75, 0.88)
UNKNOWN = trial(3, 0.2, None)
NEAR = trial(4, 0.5, 0.95)
TRIALS = [FORGETTING, WINNER, WORSE, UNKNOWN, NEAR]


@pytest.fixture
def limited(make_sweep: MakeSweep) -> SweepConfig:
    return make_sweep(**LIMITED)


def find(sweep: SweepConfig, trials: list[TrialRecord]) -> tuple[AnyTrainConfig, list[TrialRecord]]:
    base = load_base(sweep)
    return base, rank_trials(sweep, base, trials)


@pytest.mark.parametrize(
    ("bounds", "value", "violation"),
    [
        ({"max": 0.8}, 0.8, 0.0),
        ({"max": 0.8}, 1.0, 0.25),
        ({"max": 0.0}, 0.5, 0.5),
        ({"max": -2.0}, -1.0, 0.5),
        ({"min": 0.5}, 0.5, 0.0),
        ({"min": 0.5}, 0.25, 0.5),
        ({"min": 0.25, "max": 0.5}, 0.3, 0.0),
        ({"min": 0.25, "max": 0.5}, 0.75, 0.5),
        ({"min": 0.25, "max": 0.5}, 0.125, 0.5),
    ],
)
def test_violation_is_a_share_of_the_bound(
    bounds: dict[str, float], value: float, violation: float
) -> None:
    assert Constraint(**bounds).violation(value) == pytest.approx(violation)


def test_violation_of_what_is_not_finite_exceeds_any_other() -> None:
    assert Constraint(max=1.0).violation(None) > Constraint(max=1.0).violation(1e6)
    assert find_violations({TEXT: Constraint(max=1.0)}, {})


def test_best_is_the_best_of_those_that_meet_the_constraints(limited: SweepConfig) -> None:
    base, ranked = find(limited, TRIALS)
    # Then those that don't, the nearest first.
    assert [each.number for each in ranked] == [1, 2, 4, 0, 3]
    assert find_best(limited, base, ranked) == WINNER


def test_best_without_constraints_is_the_best_of_all(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(fixed=LIMITED["fixed"])
    base, ranked = find(sweep, TRIALS)
    assert find_best(sweep, base, ranked) == UNKNOWN


def test_leaderboard_has_the_limited_metric_and_no_rank_for_what_violates_it(
    limited: SweepConfig,
) -> None:
    base = load_base(limited)
    text = write_leaderboard(limited, base, TRIALS).read_bytes().decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["rank"], row["trial"], row[TEXT]) for row in rows] == [
        ("1", "1", "0.897"),
        ("2", "2", "0.88"),
        ("", "4", "0.95"),
        ("", "0", "1.543"),
        ("", "3", ""),
    ]
    assert [row["violates"] for row in rows[:2]] == ["", ""]
    assert rows[3]["violates"] == f"{TEXT} 1.5430 (max 0.9)"


def test_leaderboard_of_runs_with_texts_has_their_bits_without_any_constraint(
    make_sweep: MakeSweep,
) -> None:
    sweep = make_sweep(fixed=LIMITED["fixed"])
    text = write_leaderboard(sweep, load_base(sweep), [FORGETTING]).read_bytes().decode()
    (row,) = csv.DictReader(io.StringIO(text))
    assert row[TEXT] == "1.543"
    assert "violates" not in row


def findings_of(sweep: SweepConfig, trials: list[TrialRecord]) -> list[str]:
    base, ranked = find(sweep, trials)
    importances = measure_importances(sweep, base, ranked)
    return [str(each) for each in describe_findings(sweep, base, ranked, importances)]


def test_findings_name_the_winner_its_text_and_how_many_are_not_allowed(
    limited: SweepConfig,
) -> None:
    found = findings_of(limited, TRIALS)
    assert "3 of 5 trials with a score violate a constraint, and none of them is the best" in found
    assert any(line.startswith("best: trial 1, eval/loss 0.6100") for line in found)
    assert "the best trial's text 0.8720 -> 0.8970 bits per byte: worse than before tuning" in found


def test_findings_of_a_winner_that_forgets_name_the_constraint_that_limits_it(
    make_sweep: MakeSweep,
) -> None:
    found = findings_of(make_sweep(fixed=LIMITED["fixed"]), [FORGETTING])
    (line,) = [line for line in found if "text 0.8720 -> 1.5430" in line]
    assert f"constraints.{TEXT}.max" in line


def test_findings_without_any_trial_that_is_allowed_name_the_nearest_and_no_command(
    limited: SweepConfig,
) -> None:
    found = findings_of(limited, [FORGETTING, NEAR])
    assert len(found) == 2
    assert "no best trial and no best.yaml" in found[1]
    assert "the nearest is trial 4, eval/loss 0.5000" in found[1]
    assert found[1].endswith(f"{TEXT} 0.9500 (max 0.9)")


def test_page_marks_what_violates_and_the_best_that_does_not(limited: SweepConfig) -> None:
    base, ranked = find(limited, TRIALS)
    page = write_page(limited, base, ranked, measure_importances(limited, base, ranked), [])
    assert page is not None
    rows = page.read_bytes().decode().split("<tr class=")[1:]
    classes = [row.partition('"')[2].partition('"')[0].split() for row in rows]
    assert [("best" in each, "violating" in each) for each in classes] == [
        (True, False),
        (False, False),
        (False, True),
        (False, True),
        (False, True),
    ]
    assert f"{TEXT} 1.5430 (max 0.9)" in rows[3]
    # Without a best trial there is a page too.
    base, ranked = find(limited, [FORGETTING])
    page = write_page(limited, base, ranked, measure_importances(limited, base, ranked), [])
    assert page is not None
    assert 'class="finished best' not in page.read_bytes().decode()


def test_progress_shows_the_limited_metric_and_its_violation(limited: SweepConfig) -> None:
    line = format_trial_line(limited, FORGETTING)
    assert f"violates {TEXT} 1.5430 (max 0.9)" in line
    assert "violates" not in format_trial_line(limited, WINNER)
    journal = Journal(limited.place)
    journal.trials[0] = FORGETTING
    table = build_trial_table(limited, journal)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells[TEXT] == ["1.5430 (violates)"]


def test_scheduler_prefers_any_trial_that_meets_the_constraints(make_sweep: MakeSweep) -> None:
    scheduler_fields = {"scheduler": {"kind": "asha", "reduction_factor": 2.0}}
    sweep = make_sweep(**LIMITED, **scheduler_fields)
    journal = Journal(sweep.place)
    for number, (loss, text) in enumerate(((2.0, 0.8), (3.0, 0.8))):
        journal.start(number, {})
        journal.report(number, 3, loss, 1.0, {0: {TEXT: 0.8}, 3: {TEXT: text}})
        journal.end(number, "finished")
    scheduler = build_scheduler(sweep, load_base(sweep))
    replay_journal(scheduler, journal, sweep)
    forgetting = compute_objective(sweep, 0.1, {TEXT: 1.5})
    assert tell(scheduler, begin(scheduler, "forgetting"), 3, forgetting) == "STOP"
    kept = compute_objective(sweep, 1.0, {TEXT: 0.85})
    assert tell(scheduler, begin(scheduler, "kept"), 3, kept) == "CONTINUE"


@pytest.mark.parametrize("mode", ["min", "max"])
def test_objective_orders_by_constraints_before_the_metric(
    make_sweep: MakeSweep, mode: str
) -> None:
    sweep = make_sweep(**LIMITED, mode=mode)
    good, bad = (0.1, 9.0) if mode == "min" else (9.0, 0.1)
    objectives = [
        compute_objective(sweep, good, {TEXT: 0.9}),
        compute_objective(sweep, bad, {TEXT: 0.9}),
        compute_objective(sweep, good, {TEXT: 1.0}),
        compute_objective(sweep, good, {TEXT: 1.5}),
        compute_objective(sweep, good, {TEXT: None}),
        compute_objective(sweep, None, {TEXT: 0.9}),
    ]
    assert objectives == sorted(objectives)
    assert len(set(objectives)) == len(objectives)


def test_tpe_draws_where_the_constraints_are_met(make_sweep: MakeSweep) -> None:
    # The lower the metric, the worse the text: only ranks of 2 are allowed.
    space = {"lora.rank": {"choice": [2, 64]}}
    fields = {"space": space, "search": {"kind": "tpe", "startup_trials": 4}, "num_trials": 64}
    history = [
        TrialRecord(n, {"lora.rank": rank}, "finished", {12: loss}, {12: {TEXT: text}})
        for n, (rank, loss, text) in enumerate([(2, 2.0, 0.8), (64, 1.0, 2.0)] * 8)
    ]

    def count(sweep: SweepConfig) -> Counter[Any]:
        sampler = build_sampler(sweep)
        return Counter(sampler.sample(100 + n, history)["lora.rank"] for n in range(30))

    free = count(make_sweep(**fields, fixed=LIMITED["fixed"]))
    limited = count(make_sweep(**fields, **LIMITED))
    assert free[64] > free[2]
    assert limited[2] > limited[64]


def test_journal_keeps_the_other_metrics(tmp_path: Path) -> None:
    place = Place.local(tmp_path / "sweep")
    journal = Journal(place)
    journal.start(0, {})
    journal.report(0, 4, 2.5, 1.0, {0: {TEXT: 0.8}, 4: {TEXT: 0.9}})
    journal.report(0, 8, 2.4, 1.0, {0: {TEXT: 0.8}, 8: {TEXT: None}})
    journal.report(0, 12, 2.3, 1.0)
    again = Journal(place).trials[0]
    assert again == journal.trials[0]
    assert again.others == {0: {TEXT: 0.8}, 4: {TEXT: 0.9}, 8: {TEXT: None}}


def evaluated(step: int, **values: float | None) -> dict[str, float | None]:
    named = {f"eval/{name}": value for name, value in values.items()}
    return {"step": step, **named, "time/eval_seconds": 0.5}


def test_reader_of_other_metrics_gives_the_newest_of_each(tmp_path: Path) -> None:
    records = [
        evaluated(0, loss=5.0, a=1.0, b=0.1),
        evaluated(2, loss=4.0, a=2.0),
        evaluated(4, loss=3.0, a=None, b=0.2),
        evaluated(5, a=7.0),
    ]
    write(tmp_path / "run", *records)
    reader = EvaluationReader(Place.local(tmp_path / "run"), "eval/loss", ("eval/a", "eval/b"))
    found = reader.read_evaluations()
    before = {"eval/a": 1.0, "eval/b": 0.1}
    assert [(each.step, each.value) for each in found] == [(2, 4.0), (4, 3.0)]
    assert [each.others for each in found] == [
        {0: before, 2: {"eval/a": 2.0, "eval/b": 0.1}},
        {0: before, 4: {"eval/a": None, "eval/b": 0.2}},
    ]
    lacking = EvaluationReader(Place.local(tmp_path / "run"), "eval/loss", ("eval/c",))
    with pytest.raises(ValueError, match="eval/c is not evaluated"):
        lacking.read_evaluations()


@pytest.mark.parametrize(
    ("constraints", "problem"),
    [
        ({TEXT: {}}, rf"constraints\.{TEXT}\.max: set max, min or both"),
        ({TEXT: {"min": 2, "max": 1}}, rf"constraints\.{TEXT}\.min: got 2, which is above max, 1"),
        (
            {TEXT: {"maximum": 1}},
            rf"constraints\.{TEXT}\.maximum: no such field; did you mean .*\.max",
        ),
        ({TEXT: 0.9}, rf"constraints\.{TEXT}: got 0\.9, wanted a mapping"),
    ],
)
def test_constraint_that_cannot_be_is_refused_by_its_field(
    make_sweep: MakeSweep, constraints: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_sweep(constraints=constraints)


def test_metrics_that_no_run_reports_are_refused_together_with_near_names(
    make_sweep: MakeSweep,
) -> None:
    sweep = make_sweep(
        metric="eval/bits",
        constraints={"eval/text/bit_per_byte": {"max": 0.9}, "train/loss": {"max": 1}},
        fixed=LIMITED["fixed"],
        scheduler={"grace_steps": 4},
    )
    with pytest.raises(ConfigError) as caught:
        check_sweep(sweep, load_base(sweep))
    metric, text, loss, grace = caught.value.problems
    assert metric.startswith("metric: got eval/bits, which runs of ")
    assert text.startswith("constraints.eval/text/bit_per_byte: got ")
    assert text.endswith("did you mean eval/text/bits_per_byte or eval/bits_per_byte?")
    assert loss.startswith("constraints.train/loss: got train/loss")
    assert grace.startswith("scheduler.grace_steps: ")


@pytest.mark.parametrize("fields", [{"metric": TEXT}, {"constraints": {TEXT: {"max": 1.0}}}])
def test_metric_of_texts_needs_texts(make_sweep: MakeSweep, fields: dict[str, Any]) -> None:
    sweep = make_sweep(**fields)
    with pytest.raises(ConfigError, match=r"set eval\.texts of the base"):
        check_sweep(sweep, load_base(sweep))
    sweep = make_sweep(**fields, fixed=LIMITED["fixed"])
    check_sweep(sweep, load_base(sweep))


def test_metric_of_texts_needs_no_validation_text_and_the_loss_does(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(metric=TEXT, fixed=LIMITED["fixed"])
    assert check_metrics(sweep, load_base(sweep), validated=[]) == []
    sweep = make_sweep()
    (problem,) = check_metrics(sweep, load_base(sweep), validated=[])
    assert "data.validation_fraction" in problem


def test_metric_of_one_of_several_texts_is_known(make_sweep: MakeSweep) -> None:
    texts = [{"path": "news.txt"}, {"path": "wiki.txt"}]
    sweep = make_sweep(metric=f"{TEXT}/wiki", fixed={"eval.texts": texts})
    check_sweep(sweep, load_base(sweep))
    with pytest.raises(ConfigError, match=f"did you mean {TEXT}/wiki"):
        check_sweep(make_sweep(metric=f"{TEXT}/wikis", fixed=sweep.fixed), load_base(sweep))


def test_metric_of_texts_is_refused_where_the_step_with_the_lowest_loss_is_the_result(
    make_sweep: MakeSweep,
) -> None:
    fixed = {**LIMITED["fixed"], "checkpoint.result": "best"}
    sweep = make_sweep(metric=TEXT, fixed=fixed)
    with pytest.raises(ConfigError, match=r"fixed\.checkpoint\.result=last"):
        check_sweep(sweep, load_base(sweep))
    limited = make_sweep(constraints=LIMITED["constraints"], fixed=fixed)
    check_sweep(limited, load_base(limited))


def test_constraint_is_checked_at_the_step_that_is_the_result(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(**LIMITED)
    base = load_base(sweep)
    # Step 4 meets it, step 12 does not.
    overfitted = trial(0, 5.0, 1.5)
    assert find_best(sweep, base, [overfitted]) is None
    chosen = override(base, {"checkpoint.result": "best"})
    assert find_best(sweep, chosen, [overfitted]) == overfitted


def test_sweep_of_an_earlier_release_is_the_same_until_a_constraint_is_added(
    make_sweep: MakeSweep,
) -> None:
    sweep = make_sweep()
    base = load_base(sweep)
    recorded = {
        "sweep": {k: v for k, v in identity(sweep).items() if k != "constraints"},
        "base": identify(base),
        "eval": {
            k: v
            for k, v in to_dict(base.eval).items()
            if k in {"every_steps", "patience", "max_sequences"}
        },
    }
    (sweep.place / IDENTITY_FILE).write_json(recorded)
    check_identity(sweep.place, identify_sweep(sweep, base, recorded), field="sweep_dir")
    other = make_sweep(**LIMITED)
    now = identify_sweep(other, load_base(other), recorded)
    with pytest.raises(ConfigError) as caught:
        check_identity(sweep.place, now, field="sweep_dir")
    changed = "\n".join(caught.value.problems)
    assert f"sweep.constraints.{TEXT}.max" in changed
    assert "eval.texts" in changed


@pytest.fixture
def with_quiz(tmp_path: Path) -> dict[str, Any]:
    """Fields of a base with one task, which is part of every second evaluation."""
    path = tmp_path / "quiz.jsonl"
    path.write_text('{"id": "a", "question": "one?", "choices": ["yes", "no"], "answer": 0}\n')
    task = {"path": str(path), "format": "choices", "options": "texts"}
    return {"eval.tasks": [task], "eval.tasks_every": 2}


def test_accuracy_is_a_metric_of_runs_with_tasks(
    make_sweep: MakeSweep, with_quiz: dict[str, Any]
) -> None:
    fields = {"metric": "eval/quiz/accuracy", "mode": "max", "fixed": with_quiz}
    sweep = make_sweep(**fields, constraints={"eval/loss": {"max": 3.0}})
    base = load_base(sweep)
    check_sweep(sweep, base)
    tasks = open_tasks(base)
    assert watched_metrics(sweep, base, tasks) == ("eval/loss", "eval/quiz/accuracy")
    # Trials can be compared at every second evaluation only.
    assert evaluation_interval(sweep, base) == 6
    with pytest.raises(ConfigError, match=r"a multiple of base's eval\.every_steps, 6"):
        check_sweep(make_sweep(**fields, scheduler={"grace_steps": 3}), base)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"mode": "min"}, "mode: got min, but a higher eval/quiz/accuracy is better"),
        ({"metric": "eval/quizz/accuracy"}, "did you mean eval/quiz/accuracy"),
        ({"fixed": {}}, "metric: got eval/quiz/accuracy.*set eval.tasks of the base"),
    ],
)
def test_accuracy_that_cannot_be_compared_is_refused(
    make_sweep: MakeSweep, with_quiz: dict[str, Any], fields: dict[str, Any], problem: str
) -> None:
    given = {"metric": "eval/quiz/accuracy", "mode": "max", "fixed": with_quiz, **fields}
    sweep = make_sweep(**given)
    with pytest.raises(ConfigError, match=problem):
        check_sweep(sweep, load_base(sweep))


def test_findings_tell_the_accuracies_before_and_after(
    make_sweep: MakeSweep, with_quiz: dict[str, Any]
) -> None:
    name = "eval/quiz/accuracy"
    sample = WINNER.sample
    best = TrialRecord(0, sample, "finished", {12: 0.5}, {0: {name: 0.25}, 12: {name: 0.75}})
    found = findings_of(make_sweep(fixed=with_quiz), [best])
    assert "the best trial's quiz accuracy 0.2500 -> 0.7500" in found
