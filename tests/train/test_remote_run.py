"""Promise: a run whose directory is in object storage resumes as exactly as one on a disk."""

import re
import uuid
from http import HTTPStatus
from pathlib import Path

import pytest

from raytune_llama.config.settings import override
from raytune_llama.storage import buckets
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint.layout import (
    CheckpointError,
    RunState,
    checkpoint_path,
    list_checkpoints,
)
from raytune_llama.train.checkpoint.restore import restore
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.export import read_result
from raytune_llama.train.loop import train
from raytune_llama.train.monitoring.metrics import EVAL_LOSS, LOSS, read_metrics
from raytune_llama.train.process_group import ProcessGroup
from tests.faulty_s3 import FaultyServer
from tests.train.conftest import MakeConfig, Runs, copy_run, run_here
from tests.train.saved import ALONE, build, save, state_files

ADAPTER = "pt_lora_model/adapter_model.safetensors"
WRITES = ("PUT", "POST", "DELETE")


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    """The config of a run on the disk, to its end and undisturbed."""
    changes = {
        "run_dir": str(tmp_path_factory.mktemp("runs") / "whole"),
        "checkpoint.keep_best": True,
        "eval.every_steps": 3,
        "eval.max_sequences": 4,
    }
    config = override(runs.config, changes)
    run_here(config)
    return config


@pytest.fixture(scope="module")
def num_writes(whole: PretrainConfig, s3: Place) -> int:
    """How often such a run in object storage writes or deletes."""
    server = FaultyServer()
    # Set up anew if a parallel process comes back to this file: another directory each time.
    run_here(at(whole, server.front_of(s3) / f"counted-{uuid.uuid4().hex}"))
    server.close()
    return sum(request.startswith(WRITES) for request in server.requests)


def at(config: PretrainConfig, place: Place) -> PretrainConfig:
    return override(config, {"run_dir": str(place)})


def assert_same_run(ours: Place, wanted: Place) -> None:
    for name in (LOSS, EVAL_LOSS):
        curves = [
            [(record["step"], record[name]) for record in read_metrics(place) if name in record]
            for place in (ours, wanted)
        ]
        assert curves[0] == curves[1]
        assert len(curves[0]) >= 3
    assert (ours / ADAPTER).read_bytes() == (wanted / ADAPTER).read_bytes()
    names = [[path.name for path in list_checkpoints(place)] for place in (ours, wanted)]
    assert names[0] == names[1]


@pytest.mark.parametrize("stop_after", [1, 4])
def test_train_stopped_and_started_again_equals_the_run_on_a_disk(
    whole: PretrainConfig, s3_path: Place, stop_after: int
) -> None:
    config = at(whole, s3_path)
    stopped = run_here(config, stop_after=stop_after)
    assert (stopped.status, stopped.step) == ("stopped", stop_after)
    assert read_result(config) is None
    assert run_here(config).status == "finished"
    assert_same_run(s3_path, whole.run_place)


@pytest.mark.parametrize("part", [0.1, 0.4, 0.7, 0.95])
def test_train_killed_at_any_write_and_started_again_equals_the_run_on_a_disk(
    whole: PretrainConfig,
    num_writes: int,
    s3_path: Place,
    faulty_s3: FaultyServer,
    monkeypatch: pytest.MonkeyPatch,
    *,
    part: float,
) -> None:
    monkeypatch.setattr(buckets, "NUM_ATTEMPTS", 1)
    left = iter(range(int(part * num_writes)))
    # Whoever is killed writes nothing any more.
    faulty_s3.fault = lambda request, _: (
        HTTPStatus.FORBIDDEN if request.startswith(WRITES) and next(left, None) is None else None
    )
    with pytest.raises((OSError, CheckpointError), match=r"ACCESS_DENIED|403"):
        run_here(at(whole, faulty_s3.front_of(s3_path)))
    run_here(at(whole, s3_path))
    assert_same_run(s3_path, whole.run_place)


def test_train_shows_metrics_at_each_evaluation_and_checkpoint(
    make_config: MakeConfig, s3_path: Place
) -> None:
    config = at(make_config(checkpoint__every_steps=4, eval__every_steps=3), s3_path)
    newest: list[float] = []

    def look() -> bool:
        newest.append(max(record["step"] for record in read_metrics(s3_path)))
        return False

    train(config, ProcessGroup.single_process(), look)
    # Before each step; evaluated before step 1 and after 3, saved after 4.
    assert newest == [0, 0, 0, 3, 4, 4]
    assert max(record["step"] for record in read_metrics(s3_path)) == 6


def test_restore_where_only_an_unfinished_checkpoint_is_starts_at_step_0(
    make_config: MakeConfig, s3_path: Place
) -> None:
    config = make_config()
    session = build(config)
    (checkpoint_path(s3_path, 2) / "state.safetensors").write_bytes(b"half")
    assert restore(s3_path, session.engine, ALONE) == RunState()
    save(session, s3_path, RunState(step=2))
    assert restore(s3_path, build(config).engine, ALONE).step == 2


def test_restore_fetches_each_file_once_and_leaves_no_copy(
    runs: Runs,
    s3_path: Place,
    faulty_s3: FaultyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy_run(runs, s3_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert restore(faulty_s3.front_of(s3_path), build(runs.config).engine, ALONE).step == 5
    (file,) = state_files(list_checkpoints(s3_path)[-1])
    gets = [r for r in faulty_s3.requests if r.startswith("GET") and r.endswith(file.name)]
    assert len(gets) == 1
    assert list((tmp_path / "temporary").iterdir()) == []


def test_restore_from_storage_that_does_not_answer_blames_no_checkpoint(
    runs: Runs, s3_path: Place, faulty_s3: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "NUM_ATTEMPTS", 1)
    copy_run(runs, s3_path)
    before = s3_path.files(recursive=True)
    faulty_s3.fault = lambda request, _: (
        HTTPStatus.FORBIDDEN if re.match(r"GET .*\.safetensors$", request) else None
    )
    with pytest.raises(OSError, match="safetensors"):
        restore(faulty_s3.front_of(s3_path), build(runs.config).engine, ALONE)
    assert s3_path.files(recursive=True) == before
