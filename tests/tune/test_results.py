import csv
import io
from collections.abc import Sequence

import pytest

from raytune_llama.config.settings import load, override
from raytune_llama.storage.place import Place
from raytune_llama.train.config import PretrainConfig
from raytune_llama.tune.config import SweepConfig, load_base
from raytune_llama.tune.findings import Finding, measure_importances
from raytune_llama.tune.journal import TrialRecord
from raytune_llama.tune.plot import write_page
from raytune_llama.tune.results import rank_trials, write_best, write_leaderboard
from tests.tune.conftest import MakeSweep


def sample(rate: float, lora_rank: int = 4) -> dict[str, float]:
    return {"optim.learning_rate": rate, "lora.rank": lora_rank, "lora.alpha": 2 * lora_rank}


TRIALS = [
    TrialRecord(0, sample(1e-3), "finished", {4: 3.0, 8: 2.5, 12: 2.6}),
    TrialRecord(1, sample(1e-1), "diverged", {4: 1.0}, cause="the evaluation is not finite"),
    TrialRecord(2, sample(3e-3, 8), "finished", {4: 2.9, 8: 2.7, 12: 2.4}),
    TrialRecord(3, sample(1e-4), "stopped", {4: 3.5}),
    TrialRecord(4, sample(1e-2), "failed", cause="no\nmodel, there"),
]


@pytest.mark.parametrize(("mode", "numbers"), [("min", [2, 0, 3, 1, 4]), ("max", [3, 0, 2, 1, 4])])
def test_rank_is_by_the_newest_evaluation(
    make_sweep: MakeSweep, mode: str, numbers: list[int]
) -> None:
    sweep = make_sweep(mode=mode)
    assert [t.number for t in rank_trials(sweep, load_base(sweep), TRIALS)] == numbers


def test_rank_is_by_the_best_evaluation_where_runs_keep_the_best(make_sweep: MakeSweep) -> None:
    sweep = make_sweep()
    base = override(load_base(sweep), {"checkpoint.result": "best"})
    better = TrialRecord(5, sample(1e-3), "finished", {4: 3.0, 8: 2.3, 12: 2.8})
    plain = load_base(sweep)
    assert [trial.number for trial in rank_trials(sweep, base, [*TRIALS, better])] == [
        5,
        2,
        0,
        3,
        1,
        4,
    ]
    assert [trial.number for trial in rank_trials(sweep, plain, [*TRIALS, better])] == [
        2,
        0,
        5,
        3,
        1,
        4,
    ]


def test_leaderboard_has_a_line_a_trial(make_sweep: MakeSweep) -> None:
    sweep = make_sweep()
    base = load_base(sweep)
    file = write_leaderboard(sweep, base, TRIALS)
    rows = list(csv.DictReader(io.StringIO(file.read_bytes().decode())))
    assert [(row["rank"], row["trial"], row["eval/loss"]) for row in rows] == [
        ("1", "2", "2.4"),
        ("2", "0", "2.6"),
        ("3", "3", "3.5"),
        ("", "1", ""),
        ("", "4", ""),
    ]
    assert rows[0]["optim.learning_rate"] == "0.003"
    assert rows[4]["cause"] == "no\nmodel, there"


@pytest.mark.parametrize(("trial", "stop_step"), [(TRIALS[2], None), (TRIALS[3], 4)])
def test_best_is_a_whole_config_of_the_winner(
    make_sweep: MakeSweep, trial: TrialRecord, stop_step: int | None
) -> None:
    sweep = make_sweep(fixed={"seed": 7})
    file = write_best(sweep, load_base(sweep), trial)
    config = load(PretrainConfig, [str(file.path)])
    assert config.optim.learning_rate == trial.sample["optim.learning_rate"]
    assert config.lora is not None
    assert config.lora.rank == trial.sample["lora.rank"]
    assert config.lora.alpha == trial.sample["lora.alpha"]
    assert (config.max_steps, config.stop_step, config.seed) == (12, stop_step, 7)
    assert config.run_place == sweep.place / "best"


def write(sweep: SweepConfig, trials: Sequence[TrialRecord], *notes: Finding) -> Place | None:
    base = load_base(sweep)
    return write_page(sweep, base, trials, measure_importances(sweep, base, trials), notes)


@pytest.mark.parametrize("count", [1, 2, 60])
def test_page_shows_any_number_of_trials(make_sweep: MakeSweep, count: int) -> None:
    sweep = make_sweep()
    scored = [
        TrialRecord(n, sample(10 ** -(1 + 3 * n / count)), "finished", {12: 3 - n / count})
        for n in range(count)
    ]
    trials = rank_trials(sweep, load_base(sweep), [*scored, *TRIALS[3:]])
    page = write(sweep, trials, Finding("a < b: widen it", "raytune sweep 'x={a: 1}'"))
    assert page is not None
    html = page.read_bytes().decode()
    assert html.count("<tr class=") == count + 2
    assert "no\nmodel, there" in html
    assert "a &lt; b: widen it<pre>raytune sweep &#x27;x={a: 1}&#x27;</pre>" in html
    assert "<script" not in html
    assert (sweep.place / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_page_of_a_sweep_without_any_evaluation_is_not_made(make_sweep: MakeSweep) -> None:
    assert write(make_sweep(), TRIALS[4:]) is None
