"""Promise: what a checkpoint gives back is what was saved, or it is not used."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raytune_llama.config.settings import from_dict, override
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint import layout as checkpoint
from raytune_llama.train.checkpoint import shards as slices
from raytune_llama.train.checkpoint.config import CheckpointConfig
from raytune_llama.train.checkpoint.layout import (
    CheckpointError,
    RunState,
    check_checkpoint,
    checkpoint_path,
    delete_old_checkpoints,
    list_checkpoints,
)
from raytune_llama.train.checkpoint.restore import restore
from raytune_llama.train.config import PretrainConfig
from tests.train.conftest import MakeConfig, Runs, copy_run, run_here
from tests.train.saved import (
    ALONE,
    FULL,
    assert_same,
    build,
    hashes_of,
    open_saver,
    save,
    state_files,
    state_of,
)

MANIFEST = "manifest.json"

Damage = Callable[[Place], None]


@pytest.fixture
def stopped(runs: Runs, run_dir: Place) -> PretrainConfig:
    """The config of a copy of the stopped run, whose checkpoints are of the steps 4 and 5."""
    copy_run(runs, run_dir)
    return override(runs.config, {"run_dir": str(run_dir)})


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_restore_gives_back_every_tensor_and_number(
    make_config: MakeConfig, tmp_path: Path, precision: str
) -> None:
    run_dir = Place.local(tmp_path)
    # The adapter's own weights are float32 in any case; whole training has bf16 ones.
    fields = FULL if precision == "bf16" else {}
    config = make_config(engine__precision=precision, **fields)
    session = build(config, num_steps=2)
    engine = session.engine
    moments = [state.exp_avg for state in state_of(engine).values()]
    assert any(bool(moment.any()) for moment in moments)
    saved = RunState(
        step=2,
        tokens=1234,
        source_sequences=[5, 3],
        source_targets=[1000, 234],
        num_skipped_steps=1,
        seconds=0.1 + 0.2,
        best_step=1,
        best_loss=1 / 3,
    )
    save(session, run_dir, saved)
    fresh = build(config).engine
    assert restore(run_dir, fresh, ALONE) == saved
    assert_same(fresh, engine)
    if precision == "bf16":
        # The masters hold more than the weights that compute, and the weights follow them.
        states = state_of(fresh)
        named = dict(fresh.module.model.named_parameters())
        assert any(not torch.equal(s.weight, s.weight.bfloat16().float()) for s in states.values())
        assert all(torch.equal(named[n].flatten(), s.weight.bfloat16()) for n, s in states.items())


def test_restore_in_an_empty_folder_starts_at_step_0(
    make_config: MakeConfig, run_dir: Place
) -> None:
    config = make_config()
    engine = build(config).engine
    assert restore(run_dir, engine, ALONE) == RunState()
    assert_same(engine, build(config).engine)


def truncate(file: Place) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip_bit(file: Place) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def change_number(file: Place) -> None:
    """Leave valid JSON, in which one number of the state is another."""
    text = file.read_bytes().decode()
    changed = text.replace('"num_applied": 5', '"num_applied": 4')
    assert changed != text
    file.write_bytes(changed.encode())


def drop_list_of_files(file: Place) -> None:
    file.write_json({**file.read_json(), "files": {}})


def make_list(file: Place) -> None:
    file.write_bytes(b"[]")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state", truncate),
        ("state", flip_bit),
        ("state", Place.delete),
        (MANIFEST, truncate),
        (MANIFEST, flip_bit),
        (MANIFEST, change_number),
        (MANIFEST, drop_list_of_files),
        (MANIFEST, make_list),
    ],
)
def test_restore_damaged_newest_uses_the_one_before(
    stopped: PretrainConfig, name: str, damage: Damage
) -> None:
    run_dir = stopped.run_place
    before, newest = list_checkpoints(run_dir)
    (state_file,) = state_files(newest)
    damage(state_file if name == "state" else newest / name)
    left = {file.name: file.read_bytes() for file in newest.files()}
    state = restore(run_dir, build(stopped).engine, ALONE)
    assert state.step == 4
    assert list_checkpoints(run_dir) == [before]
    # Kept, as it is, for whoever wants to look at it.
    aside = newest.with_name(f"{newest.name}.damaged")
    assert {file.name: file.read_bytes() for file in aside.files()} == left
    assert not newest.exists()


def test_check_checkpoint_names_whichever_of_its_files_is_damaged(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "FILE_BYTES", 8192)
    run_dir = Place.local(tmp_path)
    save(build(make_config()), run_dir, RunState(step=1))
    path = checkpoint_path(run_dir, 1)
    whole = {file: file.read_bytes() for file in path.files()}
    assert len(whole) > 3
    for file, content in whole.items():
        for damage in (truncate, flip_bit, Place.delete):
            damage(file)
            problem = check_checkpoint(path, tmp_path)
            assert problem is not None, (file, damage)
            assert file.name in problem
            # Of several workers, one reads the file; the manifest is read by all.
            shares = [check_checkpoint(path, tmp_path, share=n, num_shares=3) for n in range(3)]
            assert len(shares) - shares.count(None) == (3 if file.name == MANIFEST else 1)
            file.write_bytes(content)
    assert check_checkpoint(path, tmp_path) is None


def test_restore_lost_manifest_on_a_disk_uses_the_one_before(runs: Runs, tmp_path: Path) -> None:
    # In object storage this is what an upload that was killed leaves.
    run_dir = Place.local(tmp_path / "run")
    copy_run(runs, run_dir)
    newest = list_checkpoints(run_dir)[-1]
    (newest / MANIFEST).delete()
    assert restore(run_dir, build(runs.config).engine, ALONE).step == 4
    assert newest.with_name(f"{newest.name}.damaged").exists()


def test_train_after_damage_ends_with_the_same_weights(stopped: PretrainConfig, runs: Runs) -> None:
    flip_bit(state_files(list_checkpoints(stopped.run_place)[-1])[0])
    assert run_here(stopped).status == "finished"
    places = (stopped.run_place, Place.local(runs.whole))
    ours, wanted = (hashes_of(checkpoint_path(place, 6)) for place in places)
    assert ours == wanted


def test_restore_all_damaged_stops_rather_than_start_over(stopped: PretrainConfig) -> None:
    run_dir = stopped.run_place
    for path in list_checkpoints(run_dir):
        truncate(state_files(path)[0])
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none of its"):
            restore(run_dir, build(stopped).engine, ALONE)
    for path in (run_dir / "checkpoints").folders():
        path.delete()
    assert restore(run_dir, build(stopped).engine, ALONE) == RunState()


def test_check_checkpoint_unknown_format_is_refused_by_number(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = Place.local(tmp_path)
    session = build(make_config())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "CHECKPOINT_FORMAT_VERSION", 99)
        save(session, run_dir, RunState(step=1))
        assert check_checkpoint(checkpoint_path(run_dir, 1), tmp_path) is None
    problem = check_checkpoint(checkpoint_path(run_dir, 1), tmp_path)
    assert problem is not None
    assert "99" in problem


def test_restore_ignores_an_unfinished_checkpoint_and_the_next_start_deletes_it(
    stopped: PretrainConfig,
) -> None:
    run_dir = stopped.run_place
    newest = list_checkpoints(run_dir)[-1]
    name = ".step-00000006.0123abcd.tmp" if run_dir.is_local else "step-00000006"
    unfinished = newest.with_name(name)
    (unfinished / "state.safetensors").write_bytes(b"half")
    session = build(stopped)
    assert restore(run_dir, session.engine, ALONE).step == 5
    assert unfinished.exists()
    with open_saver(session, run_dir):
        assert not unfinished.exists()
    assert len(list_checkpoints(run_dir)) == 2


def test_save_of_a_step_that_is_there_keeps_it(stopped: PretrainConfig) -> None:
    run_dir = stopped.run_place
    session = build(stopped)
    state = restore(run_dir, session.engine, ALONE)
    path = checkpoint_path(run_dir, 5)
    before = {file.name: file.read_bytes() for file in path.files()}
    save(session, run_dir, state)
    assert {file.name: file.read_bytes() for file in path.files()} == before
    assert [place.name for place in (run_dir / "checkpoints").folders()] == [
        "step-00000004",
        "step-00000005",
    ]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({"keep_last": 2, "keep_best": True}, [2, 4, 5]),
        ({"keep_last": 2, "keep_best": False}, [4, 5]),
        ({"keep_last": 1, "keep_best": True}, [2, 5]),
        ({"keep_last": 9, "keep_best": True}, [1, 2, 3, 4, 5]),
    ],
)
def test_delete_old_checkpoints_keeps_the_newest_and_the_best(
    run_dir: Place, keep: dict[str, object], kept: list[int]
) -> None:
    for step in range(1, 6):
        (checkpoint_path(run_dir, step) / MANIFEST).write_bytes(b"{}")
    config = from_dict(CheckpointConfig, keep)
    state = RunState(step=5, best_step=2, best_loss=1.0)
    delete_old_checkpoints(run_dir, config, state)
    assert list_checkpoints(run_dir) == [checkpoint_path(run_dir, step) for step in kept]


@pytest.mark.parametrize(("rollback_step", "kept"), [(2, [2, 6]), (3, [2, 6]), (5, [4, 6])])
def test_delete_old_checkpoints_keeps_where_a_bad_step_goes_back_to(
    run_dir: Place, rollback_step: int, kept: list[int]
) -> None:
    # Those of steps 3 and 5 could not be written.
    for step in (1, 2, 4, 6):
        (checkpoint_path(run_dir, step) / MANIFEST).write_bytes(b"{}")
    config = from_dict(CheckpointConfig, {"keep_last": 1})
    delete_old_checkpoints(run_dir, config, RunState(step=6, rollback_step=rollback_step))
    assert list_checkpoints(run_dir) == [checkpoint_path(run_dir, step) for step in kept]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"lora__rank": 8}, r"lora_A\.default\.weight"),
        ({"lora__modules_to_save": []}, r"embed_tokens"),
        ({"lora__targets": ["q_proj"]}, r"down_proj\.lora_A\.default\.weight is not trained"),
        ({"lora__dora": True}, r"lora_magnitude_vector"),
        (FULL, r"embed_tokens"),
    ],
)
def test_restore_into_another_model_is_refused_by_parameter(
    make_config: MakeConfig, tmp_path: Path, fields: dict[str, object], named: str
) -> None:
    run_dir = Place.local(tmp_path)
    save(build(make_config()), run_dir, RunState(step=1))
    other = build(make_config(**fields)).engine
    before = state_of(other)
    with pytest.raises(CheckpointError, match=named):
        restore(run_dir, other, ALONE)
    after = state_of(other)
    assert all(torch.equal(after[name].weight, state.weight) for name, state in before.items())


def test_check_checkpoint_written_again_by_hand_is_not_trusted(
    stopped: PretrainConfig, tmp_path: Path
) -> None:
    path = list_checkpoints(stopped.run_place)[-1]
    assert check_checkpoint(path, tmp_path) is None
    (path / MANIFEST).write_json({**(path / MANIFEST).read_json(), "world_size": 7})
    assert check_checkpoint(path, tmp_path) is not None
