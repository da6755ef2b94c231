"""A whole job on Ray that meets one text which makes the loss nan: it stops, or goes on without."""

import random
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import override
from raytune_llama.train.monitoring.incident_log import BAD_STEPS_FILE
from raytune_llama.train.monitoring.metrics import LOSS, read_metrics, read_records
from raytune_llama.train.trainer import run_training
from tests.train.conftest import WORDS, build_config
from tests.train.marked import write_broken_model

MARK = "Q"
"""The model makes nan of it."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_job_with_a_nan_text_stops_by_name_or_goes_on_without_it(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    generator = random.Random(1)
    lines = [" ".join(generator.choices(WORDS, k=6)) for _ in range(24)]
    lines[13] += f" {MARK}"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(lines))
    values: dict[str, Any] = {
        "run_dir": str(tmp_path / "stop"),
        "model": {"path": str(write_broken_model(tmp_path / "model", tokenizer_dir, MARK))},
        "data": {
            "sources": [{"path": str(corpus)}],
            "store_dir": str(tmp_path / "store"),
            "validation_fraction": 0.0,
        },
        "lora": {"rank": 4},
        "batch": {"sequence_tokens": 64, "sequences_per_step": 4, "packing": "crops"},
        "engine": {"precision": "fp32", "zero_stage": 2},
        "scale": {"num_workers": 2},
        "logging": {"tensorboard": False, "every_steps": 1},
        "num_epochs": 1.0,
    }
    config = build_config(values, {})
    with pytest.raises(FloatingPointError, match="summed loss nan"):
        run_training(config)
    skipping = override(config, {"run_dir": str(tmp_path / "skip"), "optim.on_bad_step": "skip"})
    assert run_training(skipping).status == "finished"
    stopped, skipped = (
        read_records(each.run_place / BAD_STEPS_FILE) for each in (config, skipping)
    )
    # Ray has not tried the stopped run again.
    assert [record["answer"] for record in (*stopped, *skipped)] == ["stop", "skip"]
    for (record,) in (stopped, skipped):
        suspects = [s for s in record["samples"] if s.get("suspect")]
        (document,) = suspects[0]["documents"]
        assert len(suspects) == 1
        assert document["file"] == corpus.name
        text = corpus.read_bytes()[document["offset"] :].split(b"\n")[0].decode()
        assert text == lines[13]
    losses = [r[LOSS] for r in read_metrics(skipping.run_place) if LOSS in r]
    assert len(losses) == 6
    assert losses.count(None) == 1  # pyright: ignore[reportArgumentType]  # of the skipped step
