"""Whole runs and sweeps with held-out texts and tasks, whose stores are built on Ray."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import ConfigError, from_dict, override, write_yaml
from raytune_llama.data.store.manifest import StoreError
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.monitoring.metrics import (
    EVAL_LOSS,
    EVAL_TEXT_BITS_PER_BYTE,
    read_change,
    read_metrics,
)
from raytune_llama.train.trainer import run_training
from raytune_llama.tune.config import SweepConfig
from raytune_llama.tune.journal import trial_dir
from raytune_llama.tune.sweep import run_sweep
from tests.pipeline.conftest import MakeJob

pytestmark = pytest.mark.ray

ACCURACY = "eval/quiz/accuracy"


@pytest.fixture
def held_out(tmp_path: Path) -> dict[str, Any]:
    """Fields of a run with one text, unlike what it trains on, and one task."""
    (tmp_path / "held_out.txt").write_text("zebra quartz jumps over vexing foxes\n" * 20)
    rows = [
        {"id": str(n), "question": f"{n} nothing is", "choices": ["lost", "zebra"], "answer": 0}
        for n in range(4)
    ]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"path": str(tmp_path / "quiz.jsonl"), "format": "choices", "options": "texts"}
    return {"eval__texts": [{"path": str(tmp_path / "held_out.txt")}], "eval__tasks": [task]}


def curve(config: PretrainConfig, name: str) -> list[float]:
    return [record[name] for record in read_metrics(config.run_place) if name in record]


@pytest.mark.usefixtures("ray_cluster")
def test_run_encodes_its_texts_once_and_ends_with_what_became_of_them(
    make_job: MakeJob, held_out: dict[str, Any], tmp_path: Path
) -> None:
    config = make_job(**held_out, lora__dropout=0.0)
    run = run_training(config)
    values = curve(config, EVAL_TEXT_BITS_PER_BYTE)
    assert len(values) == len(curve(config, ACCURACY)) == 3
    assert (run.text_before, run.text_after) == (values[0], values[-1])
    assert run.evaluation_line is not None
    assert f"text {values[0]:.4f} -> {values[-1]:.4f} bits per byte: " in run.evaluation_line
    assert run.evaluation_line.endswith(
        f"quiz accuracy {curve(config, ACCURACY)[0]:.4f} -> {curve(config, ACCURACY)[-1]:.4f}"
    )
    assert run_training(config).evaluation_line == run.evaluation_line
    # In its own store, next to that of the run.
    store = TokenStore.open(tmp_path / "store-texts")
    assert store.split("train").num_documents == 20
    # One worker has the same values from the same store.
    alone = make_job("alone", **held_out, scale__num_workers=1, lora__dropout=0.0)
    run_training(alone)
    assert curve(alone, EVAL_TEXT_BITS_PER_BYTE) == pytest.approx(values, rel=1e-5)
    assert curve(alone, ACCURACY) == curve(config, ACCURACY)
    # Another text is refused before anything starts.
    (tmp_path / "held_out.txt").write_text("another text\n")
    with pytest.raises(StoreError, match=r"^eval\.store_dir: "):
        run_training(make_job("other", **held_out))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_sweep_chooses_the_best_trial_that_meets_the_constraint(
    make_job: MakeJob, held_out: dict[str, Any], tmp_path: Path
) -> None:
    fields = {"scale__num_workers": 1, "engine__strategy": "ddp", "engine__zero_stage": None}
    base = make_job("unused", **fields, **held_out)
    write_yaml(base, tmp_path / "base.yaml")

    def sweep_of(name: str, **bounds: float) -> SweepConfig:
        return from_dict(
            SweepConfig,
            {
                "sweep_dir": str(tmp_path / name),
                "job": "pretrain",
                "base": str(tmp_path / "base.yaml"),
                "fixed": {"eval.every_steps": 2, "eval.max_sequences": 64},
                "space": {"optim.learning_rate": {"choice": [3e-2, 1e-4]}},
                "search": {"kind": "grid"},
                "scheduler": {"kind": "none"},
                "constraints": {EVAL_TEXT_BITS_PER_BYTE: bounds},
                "max_steps": 8,
            },
        )

    free = run_sweep(sweep_of("free", max=1e6))
    best = free.trials[0]
    assert best.number == 0
    won, lost = (trial.others[8][EVAL_TEXT_BITS_PER_BYTE] for trial in free.trials)
    assert won is not None
    assert lost is not None
    # A model of random weights gets better on any text: a lower limit excludes the winner.
    assert won < lost
    limit = (won + lost) / 2
    limited = run_sweep(sweep_of("limited", min=limit))
    assert limited.status == "finished"
    assert [trial.number for trial in limited.trials] == [1, 0]
    rows = list(csv.DictReader((tmp_path / "limited" / "leaderboard.csv").open()))
    assert [(row["rank"], bool(row["violates"])) for row in rows] == [("1", False), ("", True)]
    assert [row[ACCURACY] != "" for row in rows] == [True, True]
    records = read_metrics(trial_dir(limited.sweep_dir, 1))
    change = read_change(records, EVAL_TEXT_BITS_PER_BYTE, last_step=8)
    assert float(rows[0][EVAL_TEXT_BITS_PER_BYTE]) == change.after == lost
    assert any("1 of 2 trials with a score violate" in str(each) for each in limited.findings)
    # Without any that meets it there is no best.
    none = run_sweep(sweep_of("none", min=1e3))
    assert (none.status, none.best_config) == ("failed", None)
    assert not (tmp_path / "none" / "best.yaml").exists()
    assert any("the nearest is trial 1" in str(each) for each in none.findings)
    # The texts of a sweep may not change.
    changed = override(sweep_of("limited", min=limit), {"fixed": {"eval.every_steps": 4}})
    with pytest.raises(ConfigError, match=r"eval\.every_steps: 2 -> 4"):
        run_sweep(changed)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_sweep_by_the_accuracy_of_a_task_finds_its_best(
    make_job: MakeJob, held_out: dict[str, Any], tmp_path: Path
) -> None:
    fields = {"scale__num_workers": 1, "engine__strategy": "ddp", "engine__zero_stage": None}
    write_yaml(make_job("unused", **fields, **held_out), tmp_path / "base.yaml")
    sweep = from_dict(
        SweepConfig,
        {
            "sweep_dir": str(tmp_path / "sweep"),
            "job": "pretrain",
            "base": str(tmp_path / "base.yaml"),
            "fixed": {"eval.every_steps": 2, "eval.tasks_every": 2},
            "space": {"optim.learning_rate": {"choice": [3e-2, 1e-5]}},
            "search": {"kind": "grid"},
            "scheduler": {"kind": "asha", "reduction_factor": 2},
            "metric": ACCURACY,
            "mode": "max",
            "max_steps": 8,
        },
    )
    summary = run_sweep(sweep)
    assert summary.status == "finished"
    best, other = summary.trials
    assert best.value is not None
    assert other.value is not None
    assert best.value >= other.value
    assert set(best.values) <= {4, 8}
    records = read_metrics(trial_dir(summary.sweep_dir, best.number))
    assert [record["step"] for record in records if ACCURACY in record] == [0, 4, 8]
    assert [record["step"] for record in records if EVAL_LOSS in record] == [0, 2, 4, 6, 8]
