"""W&B offline: what its own file holds, which `wandb sync` uploads."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.storage.place import Place
from raytune_llama.train.export import result_path
from raytune_llama.train.identity import identify, read_identity, write_identity
from raytune_llama.train.monitoring.config import WandbConfig
from raytune_llama.train.monitoring.metrics import LOSS, read_metrics
from raytune_llama.train.monitoring.plot import write_plot
from raytune_llama.train.monitoring.trackers.session import track_run
from raytune_llama.train.monitoring.trackers.tracker import TrackedRun
from raytune_llama.train.monitoring.trackers.wandb import WandbTracker
from tests.train.conftest import MakeConfig, run_here

wandb = pytest.importorskip("wandb")


def read_records(file: Path) -> Iterator[bytes]:
    """Yield the records of a file of W&B's: LevelDB's log format after a header of 7 bytes."""
    data, at, parts = file.read_bytes(), 7, []
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:  # a block ends with zeros
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in {1, 4}:  # complete, or the last part
            yield b"".join(parts)
            parts = []


def read_run(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Return what W&B's client has written of a run: history and config, as JSON texts by key."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # made when it is imported
    (file,) = folder.glob("*.wandb")
    found: dict[str, list[dict[str, str]]] = {"history": [], "config": [], "run": []}
    for data in read_records(file):
        record = messages.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            found["history"].append(
                {item.key or "/".join(item.nested_key): item.value_json for item in items}
            )
        elif kind == "config":
            found["config"].append({item.key: item.value_json for item in record.config.update})
        elif kind == "run":
            found["run"].append({"id": record.run.run_id, "group": record.run.run_group})
    return found


def test_wandb_offline_has_metrics_config_lineage_and_files(make_config: MakeConfig) -> None:
    config = make_config(logging__wandb={"mode": "offline", "project": "tests"}, max_steps=8)
    write_identity(config, identify(config))
    for stop_after in (3, None):
        with track_run(config, read_identity(config.run_place)) as tracked:
            result = run_here(config, stop_after=stop_after)
            write_plot(config.run_place)
            is_stopped = result.status == "stopped"
            tracked.end("interrupted" if is_stopped else "finished", result_path(config))
    starts = sorted(Path(config.run_dir, "wandb").glob("offline-run-*"))
    assert len(starts) == 2
    first, second = (read_run(folder) for folder in starts)
    # Both belong to one run.
    assert {run["id"] for part in (first, second) for run in part["run"]} == {first["run"][0]["id"]}
    sent = [
        (int(row["step"]), float(row[LOSS]))
        for part in (first, second)
        for row in part["history"]
        if LOSS in row
    ]
    assert sent == [(r["step"], r[LOSS]) for r in read_metrics(config.run_place) if LOSS in r]
    texts = "".join(str(each) for each in [*first["config"], *second["config"]])
    assert '"learning_rate": 0.01' in texts.replace('":0.01', '": 0.01')
    assert '"result_hash"' in texts
    assert list(starts[1].rglob("raytune/pt_lora_model/manifest.json"))


def test_wandb_that_is_given_up_names_the_folder_of_what_was_not_uploaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _signal: killed.append(pid))
    tracker = WandbTracker(WandbConfig(mode="offline", project="tests"))
    run = TrackedRun(
        run_dir=Place.local(tmp_path), name="run", job="sft", config={}, tags={"raytune.base": "m"}
    )
    tracker.open(run, None, None).end("finished")
    tracker.abandon()
    assert "wandb sync" not in caplog.text
    opened = tracker.open(run, None, None)
    tracker.abandon()
    assert killed
    opened.end("finished")
    assert f"wandb sync {tmp_path}/wandb/run-*" in caplog.text
