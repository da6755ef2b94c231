import math
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.tune.config import SearchConfig, SweepConfig, load_base
from raytune_llama.tune.journal import Journal, TrialRecord, trial_dir
from raytune_llama.tune.search import (
    RandomSampler,
    TpeSampler,
    TrialSearcher,
    check_samples,
    count_remaining,
)
from raytune_llama.tune.space import Distribution, TrialSample
from tests.tune.conftest import MakeSweep


def search_of(sweep: SweepConfig, *, bad: tuple[int, ...] = ()) -> tuple[TrialSearcher, Journal]:
    """Begin or go on with a sweep in which some trials can't run."""

    def prepare(number: int, sample: TrialSample) -> None:
        assert sample
        if number in bad:
            raise ConfigError([f"model.path: trial {number} has none"])

    journal = Journal(sweep.place)
    return TrialSearcher(sweep, journal, prepare), journal


def numbers_of(search: TrialSearcher) -> list[int]:
    """Ask for trials until there is none."""
    found: list[int] = []
    while (answer := search.suggest("id")) != Searcher.FINISHED:
        assert answer is not None
        found.append(answer["number"])
    return found


def test_samples_that_all_fit_become_configs(make_sweep: MakeSweep) -> None:
    sweep = make_sweep()
    configs = check_samples(sweep, load_base(sweep))
    assert len(configs) == 6
    for number, config in enumerate(configs):
        assert config.lora is not None
        assert config.lora.alpha == 2 * config.lora.rank
        assert config.run_place == trial_dir(sweep.place, number)


@pytest.mark.parametrize("kind", ["grid", "random", "tpe"])
def test_samples_of_which_some_are_illegal_are_refused_with_examples(
    make_sweep: MakeSweep, kind: str
) -> None:
    space = {"lora.rank": {"choice": [4, 0]}, "batch.micro_batch_sequences": {"choice": [2, 64]}}
    sweep = make_sweep(space=space, search={"kind": kind}, num_trials=4 if kind == "grid" else 50)
    with pytest.raises(ConfigError) as caught:
        check_samples(sweep, load_base(sweep))
    head, *problems = caught.value.problems
    # Of the four points, one is legal.
    bad, total = (int(word) for word in head.split() if word.isdecimal())
    assert bad / total == pytest.approx(0.75, abs=0.15)
    assert any("lora.rank" in problem for problem in problems)
    assert any("micro_batch_sequences: 64" in problem for problem in problems)


def test_samples_of_an_unknown_field_name_the_right_one(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(space={"optim.lr": {"loguniform": [1e-4, 1e-2]}})
    with pytest.raises(ConfigError, match=r"6 of 6 samples(.|\n)*optim\.lr: no such field"):
        check_samples(sweep, load_base(sweep))


def test_grid_with_more_trials_than_points_is_refused(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(
        space={"lora.rank": {"choice": [2, 4]}}, search={"kind": "grid"}, num_trials=3
    )
    with pytest.raises(ConfigError, match="the grid has 2 points"):
        check_samples(sweep, load_base(sweep))


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_search_of_the_same_seed_hands_out_the_same_trials(
    make_sweep: MakeSweep, tmp_path: Path, kind: str
) -> None:
    begun: list[list[TrialSample]] = []
    for name in ("first", "again"):
        sweep = make_sweep(sweep_dir=str(tmp_path / name), search={"kind": kind})
        search, journal = search_of(sweep)
        assert numbers_of(search) == list(range(6))
        begun.append([trial.sample for trial in journal.trials.values()])
    assert begun[0] == begun[1]
    assert len({str(sample) for sample in begun[0]}) == 6


def test_search_after_a_crash_begins_with_what_has_no_end(make_sweep: MakeSweep) -> None:
    sweep = make_sweep()
    search, journal = search_of(sweep)
    for _ in range(3):
        search.suggest("id")
    journal.report(1, 3, 2.0, 1.0)
    journal.end(1, "finished")
    before = dict(journal.trials)

    again, journal = search_of(sweep)
    assert count_remaining(sweep, journal) == 5
    assert numbers_of(again) == [0, 2, 3, 4, 5]
    assert {number: journal.trials[number] for number in range(3)} == before


def test_search_passes_over_trials_that_cannot_run_and_notes_why(make_sweep: MakeSweep) -> None:
    search, journal = search_of(make_sweep(), bad=(0, 3))
    assert numbers_of(search) == [1, 2, 4, 5]
    assert [n for n, trial in journal.trials.items() if trial.state == "failed"] == [0, 3]
    assert "trial 3 has none" in (journal.trials[3].cause or "")


def test_search_of_a_finished_sweep_with_more_trials_goes_on(make_sweep: MakeSweep) -> None:
    search, journal = search_of(make_sweep(num_trials=2))
    for number in numbers_of(search):
        journal.end(number, "finished")
    assert count_remaining(make_sweep(num_trials=2), journal) == 0
    assert count_remaining(make_sweep(num_trials=3), journal) == 1
    assert numbers_of(search_of(make_sweep(num_trials=3))[0]) == [2]


def make_history(sampler: Any, count: int) -> list[TrialRecord]:  # noqa: ANN401
    """Run trials whose score is the distance of the rate's logarithm from 1e-3's."""
    history: list[TrialRecord] = []
    for number in range(count):
        sample = sampler.sample(number, history)
        value = abs(math.log10(sample["rate"]) + 3)
        history.append(TrialRecord(number, sample, "finished", {10: value}))
    return history


def test_parzen_sampler_learns_from_trials_and_from_nothing_else() -> None:
    space = {"rate": from_dict(Distribution, {"loguniform": [1e-7, 1e-1]})}
    config = SearchConfig(kind="tpe", startup_trials=8)
    learned = make_history(TpeSampler(space, config, "min"), 24)
    drawn = make_history(RandomSampler(space, config.seed), 24)

    def mean(history: list[TrialRecord]) -> float:
        return sum(trial.value or 0.0 for trial in history[8:]) / 16

    assert mean(learned) < 0.6 * mean(drawn)
    # One that is made anew, as after a crash, goes on alike.
    assert TpeSampler(space, config, "min").sample(20, learned[:20]) == learned[20].sample
    # The other way round it looks elsewhere.
    assert mean(make_history(TpeSampler(space, config, "max"), 24)) > mean(drawn)


def test_parzen_sampler_tells_trials_that_run_at_a_time_apart() -> None:
    space = {"rate": from_dict(Distribution, {"loguniform": [1e-7, 1e-1]})}
    config = SearchConfig(kind="tpe", startup_trials=4)
    sampler = TpeSampler(space, config, "min")
    history = make_history(sampler, 8)
    running = TrialRecord(8, sampler.sample(8, history))
    pruned = TrialRecord(9, sampler.sample(9, history), "stopped", {3: 1.0})
    failed = TrialRecord(10, sampler.sample(10, history), "failed")
    sample = sampler.sample(11, [*history, running, pruned, failed])
    assert sample not in [trial.sample for trial in (*history, running, pruned, failed)]


def test_searcher_that_is_stopped_hands_out_no_more_and_starts_none(make_sweep: MakeSweep) -> None:
    search, journal = search_of(make_sweep())
    first = search.suggest("id")
    assert first is not None
    search.stop()
    assert numbers_of(search) == []
    assert list(journal.trials) == [first["number"]]
    again, _ = search_of(make_sweep())
    assert numbers_of(again) == list(range(6))
