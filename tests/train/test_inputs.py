"""Promise: a run whose length is likely not meant says so, with its numbers and what to change."""

from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.train.estimate.plan import build_plan, render_plan
from raytune_llama.train.inputs import (
    build_batch_plan,
    build_evaluation_sources,
    build_sources,
    find_horizon_warnings,
)
from raytune_llama.train.trainer import prepare_run
from tests.train.conftest import MakeConfig, fields_of, make_texts, problems_of, write_store

LONG = {"max_steps": 200}


@pytest.mark.parametrize(
    ("fields", "num_steps", "num_sequences", "field", "facts"),
    [
        (
            {"max_steps": None, "num_epochs": 3.0, "batch__sequences_per_step": 64},
            1,
            5,
            "batch.sequences_per_step",
            ["got 64", "only 5 sequences", "num_epochs=3", "1 step", "5 or less"],
        ),
        (
            {**LONG, "batch__sequences_per_step": 64},
            200,
            32,
            "batch.sequences_per_step",
            ["got 64", "only 32 sequences", "every sequence 2 times"],
        ),
        ({"max_steps": 9}, 9, 500, "max_steps", ["9 steps of 4 sequences"]),
        ({"max_steps": None, "num_epochs": 1}, 9, 36, "num_epochs", ["9 steps of 4"]),
        ({**LONG, "stop_step": 7}, 200, 500, "stop_step", ["7 steps"]),
        (
            {"max_steps": 20, "schedule__warmup_ratio": 0.99},
            20,
            500,
            "schedule.warmup_ratio",
            ["0.99", "20 steps", "ends after 20", "100%"],
        ),
        (
            {**LONG, "schedule__warmup_ratio": 0.5, "stop_step": 50},
            200,
            500,
            "schedule.warmup_ratio",
            ["100 steps", "ends after 50", "50% of optim.learning_rate"],
        ),
        (
            {**LONG, "eval__every_steps": 50, "eval__patience": 4},
            200,
            500,
            "eval.patience",
            ["4 evaluations", "50 steps", "200 steps"],
        ),
    ],
)
def test_horizon_that_is_likely_not_meant_is_told_with_field_and_numbers(  # noqa: PLR0917
    make_config: MakeConfig,
    fields: dict[str, Any],
    num_steps: int,
    num_sequences: int,
    field: str,
    facts: list[str],
) -> None:
    config = make_config(**fields)
    found = find_horizon_warnings(config, num_steps, num_sequences)
    named = dict(zip(fields_of(found), found, strict=True))
    assert field in named
    assert all(fact in named[field] for fact in facts), named[field]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_steps": 10},
        {"max_steps": 0},
        {**LONG, "schedule__warmup_ratio": 0.99},
        {**LONG, "eval__every_steps": 50, "eval__patience": 3},
    ],
)
def test_horizon_that_makes_sense_is_told_nothing(
    make_config: MakeConfig, fields: dict[str, Any]
) -> None:
    config = make_config(**fields)
    assert find_horizon_warnings(config, config.max_steps or 0, 500) == []


def test_horizon_of_one_warm_up_step_is_not_called_a_warm_up(make_config: MakeConfig) -> None:
    # Its only step has the full rate: that it is only one is what is told.
    config = make_config(max_steps=1)
    assert fields_of(find_horizon_warnings(config, 1, 500)) == ["max_steps"]


def test_plan_shows_the_warnings_of_the_horizon_with_and_without_a_store(
    make: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for fields in ({}, {"data__store_dir": str(tmp_path / "none")}):
        plan = build_plan(make(plan=True, **fields))
        assert fields_of(list(plan.warnings))[0] == "max_steps"
        assert "warning      max_steps: the run takes only 6 steps" in render_plan(plan)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_run_logs_the_warnings_of_the_horizon_before_it_starts(
    make: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make()
    store = TokenStore.open(Path(config.data.store_dir))
    prepare_run(config, store, None)  # pyright: ignore[reportArgumentType]  # only carried along
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "max_steps" in fields_of(told)


NEEDING: list[dict[str, Any]] = [
    {"max_steps": 0},
    {"eval__patience": 1},
    {"checkpoint__result": "best"},
]


@pytest.mark.parametrize("fields", NEEDING)
def test_field_that_needs_an_evaluation_is_refused_without_validation_text(
    make: MakeConfig, tokenizer_dir: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    (field,) = [name.replace("__", ".") for name in fields]
    (problem,) = problems_of(make(**fields))
    assert problem.startswith(f"{field}: got ")
    assert "data.validation_fraction" in problem
    assert problems_of(make(**fields, data__validation_fraction=0.1)) == []
    # What the store holds decides.
    write_store(tmp_path / "store", tokenizer_dir, train=[make_texts(40, seed=1)], validation=[])
    config = make(**fields, data__store_dir=str(tmp_path / "store"))
    store = TokenStore.open(tmp_path / "store")
    with pytest.raises(ConfigError, match=rf"^{field}: got "):
        prepare_run(config, store, None)  # pyright: ignore[reportArgumentType]
    assert not config.run_place.exists()


def test_batch_plan_of_an_evaluation_has_no_step_whatever_the_weights(
    make_config: MakeConfig, two_sources_dir: Path
) -> None:
    # One step has too few sequences for the smaller weight.
    sources = [{"path": "a.txt", "weight": 1.0}, {"path": "b.txt", "weight": 0.01}]
    fields = {"data__store_dir": str(two_sources_dir), "data__sources": sources}
    config = make_config(max_steps=0, **fields)
    store = TokenStore.open(two_sources_dir)
    plan = build_batch_plan(config, build_sources(config, store))
    assert plan.num_steps == 0
    assert len(build_evaluation_sources(config, store)) == 2
