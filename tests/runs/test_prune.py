"""Promise: only what is named is deleted, and never what a driver uses or a run needs to resume."""

import fcntl
import os
import shutil
import time
from pathlib import Path

import pytest

from raytune_llama.config.settings import ConfigError, to_yaml
from raytune_llama.runs.prune import (
    QUIET_SECONDS,
    Candidate,
    delete_places,
    find_candidates,
    render_candidates,
)
from raytune_llama.storage.lease import LEASE_FOLDER
from raytune_llama.storage.place import Place
from raytune_llama.train.checkpoint.layout import checkpoint_path, list_checkpoints
from raytune_llama.tune.journal import Journal, trial_dir
from tests.runs.conftest import HoldLease, MakeRun, entry_at, survey
from tests.train.conftest import make_texts, run_here, write_store
from tests.tune.conftest import MakeSweep, make_sweep

__all__ = ["make_sweep"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this machine that no other test fills."""
    monkeypatch.delenv("RAYTUNE_LLAMA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    return tmp_path / ".cache" / "raytune_llama"


def make_old(folder: Path) -> None:
    """Give all files of a folder, or a file, a time before which nothing is in use."""
    then = time.time() - 2 * QUIET_SECONDS
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (then, then), follow_symlinks=False)


def candidates(*places: Path | Place) -> dict[Place, Candidate]:
    return {each.place: each for each in find_candidates(survey(*places))}


def refuse(name: Path | Place, *roots: Path | Place) -> str:
    """Return why something is not deleted, after checking that nothing was."""
    with pytest.raises(ConfigError) as raised:
        delete_places(survey(*roots), [str(name)])
    assert "nothing was deleted" in raised.value.problems
    assert (name if isinstance(name, Place) else Place.local(name)).exists()
    return str(raised.value)


def test_older_checkpoints_of_an_unfinished_run_may_go_and_the_newest_not(
    make_run: MakeRun, run_dir: Place
) -> None:
    fields = {"checkpoint__keep_last": 3, "checkpoint__keep_best": False, "eval__every_steps": 6}
    config = make_run(place=run_dir, stop_after=5, **fields)
    old, middle, newest = list_checkpoints(run_dir)
    found = candidates(run_dir)
    assert set(found) == {old, middle}
    size = sum(status.num_bytes for status in old.files(recursive=True).values())
    assert delete_places(survey(run_dir), [str(old)]) == size
    assert list_checkpoints(run_dir) == [middle, newest]
    assert "newest checkpoint" in refuse(newest, run_dir)
    assert run_here(config).status == "finished"


def test_best_checkpoint_of_an_unfinished_run_stays(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(stop_after=5)
    entry = entry_at(tmp_path / "runs" / "run")
    (best,) = [each.folder.place for each in entry.checkpoints if each.is_best]
    assert best == checkpoint_path(entry.place, 3)
    assert best not in candidates(tmp_path / "runs")
    assert "best checkpoint" in refuse(best, tmp_path / "runs")


def test_checkpoints_of_a_finished_run_may_all_go(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run()
    names = [str(place) for place in list_checkpoints(config.run_place)]
    assert names
    delete_places(survey(tmp_path / "runs"), names)
    entry = entry_at(tmp_path / "runs" / "run")
    assert (entry.state, entry.checkpoints) == ("finished", ())


def test_nothing_of_a_running_run_is_deleted(
    make_run: MakeRun, hold_lease: HoldLease, tmp_path: Path
) -> None:
    config = make_run(stop_after=5, checkpoint__keep_best=False, eval__every_steps=6)
    old = list_checkpoints(config.run_place)[0]
    before = survey(tmp_path / "runs")
    driver = hold_lease(config.run_place)
    assert f"process {driver.pid}" in refuse(old, tmp_path / "runs")
    assert f"process {driver.pid}" in refuse(config.run_place, tmp_path / "runs")
    # A driver that has started since the directories were read is seen too.
    with pytest.raises(ConfigError, match=f"process {driver.pid}"):
        delete_places(before, [str(old)])
    assert old.exists()


def test_whole_finished_run_is_deleted_and_its_bytes_are_counted(
    make_run: MakeRun, run_dir: Place
) -> None:
    run = run_dir / "run"
    make_run(place=run)
    size = entry_at(run).folder.num_bytes
    assert delete_places(survey(run_dir), [str(run), str(list_checkpoints(run)[0])]) == size
    assert not run.exists()


def test_whole_run_that_can_be_resumed_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(stop_after=3)
    assert "can be resumed" in refuse(tmp_path / "runs" / "run", tmp_path / "runs")


def test_run_whose_adapter_an_unfinished_run_continues_is_refused(
    make_run: MakeRun, tmp_path: Path
) -> None:
    result = make_run("first").run_place / "pt_lora_model"
    make_run("second", lora=None, adapter=str(result), stop_after=2)
    assert "second (interrupted) needs it" in refuse(tmp_path / "runs" / "first", tmp_path / "runs")


def test_store_that_no_run_refers_to_may_go_and_others_not(
    make_run: MakeRun, store_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    stores = tmp_path / "stores"
    shutil.copytree(store_dir, stores / "used")
    for number, name in enumerate(("unused", "young")):
        texts = make_texts(20, seed=10 + number)
        write_store(stores / name, tokenizer_dir, train=[texts[:15]], validation=[texts[15:]])
    for name in ("used", "unused"):
        make_old(stores / name)
    make_run(data__store_dir=str(stores / "used"), stop_after=2)
    found = candidates(tmp_path)
    assert {place.name for place in found} == {"unused", "young"}
    assert "a job may use it" in refuse(stores / "young", tmp_path)
    assert "needs it as its store" in refuse(stores / "used", tmp_path)
    size = found[Place.local(stores / "unused")].num_bytes
    assert delete_places(survey(tmp_path), [str(stores / "unused")]) == size > 0
    assert not (stores / "unused").exists()


def test_doubt_is_named_where_a_damaged_run_may_refer_to_a_store(
    make_run: MakeRun, store_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(store_dir, tmp_path / "stores" / "one")
    make_old(tmp_path / "stores")
    make_run(stop_after=1)
    for name in ("run.yaml", "identity.json"):
        (tmp_path / "runs" / "run" / name).write_text("{")
    found = candidates(tmp_path)[Place.local(tmp_path / "stores" / "one")]
    assert "1 damaged" in found.reason


@pytest.mark.parametrize(
    "name",
    [
        ".merged.0123456789abcdef0123456789abcdef.tmp",
        "runs/.probe-0123456789abcdef0123456789abcdef",
        "store.partial-0123456789ab",
    ],
)
def test_leftover_of_a_killed_process_may_go_once_nothing_writes_to_it(
    tmp_path: Path, name: str
) -> None:
    left = tmp_path / "work" / name
    left.mkdir(parents=True)
    (left / "part.bin").write_bytes(b"x" * 1000)
    assert "nothing must have written" in refuse(left, tmp_path / "work")
    make_old(left)
    assert delete_places(survey(tmp_path / "work"), [str(left)]) == 1000
    assert not left.exists()


def test_unfinished_and_damaged_checkpoints_of_a_run_are_leftovers(
    make_run: MakeRun, run_dir: Place
) -> None:
    make_run(place=run_dir, stop_after=2)
    lost = [run_dir / "checkpoints" / "step-00000001.damaged"]
    if run_dir.is_local:
        lost.append(run_dir / "checkpoints" / ".step-00000004.0123456789ab.tmp")
    else:
        lost.append(run_dir / "checkpoints" / "step-00000004")
    for place in lost:
        (place / "state.safetensors").write_bytes(b"x" * 500)
    found = candidates(run_dir)
    assert set(found) == set(lost)
    assert delete_places(survey(run_dir), [str(place) for place in lost]) == 1000
    assert not any(place.exists() for place in lost)
    assert len(list_checkpoints(run_dir)) == 1


def test_temporary_file_of_a_killed_write_is_a_leftover(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(stop_after=2)
    left = config.run_place / ".run.yaml.0123456789abcdef0123456789abcdef.tmp"
    left.path.write_bytes(b"half")
    assert delete_places(survey(tmp_path / "runs"), [str(left)]) == 4
    assert entry_at(config.run_place).state == "interrupted"


def test_work_of_a_store_that_a_job_builds_is_in_use(tmp_path: Path) -> None:
    work = tmp_path / "stores" / "store.partial-0123456789ab"
    work.mkdir(parents=True)
    make_old(work)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make_old(work)
        assert "a job is building this store" in refuse(work, tmp_path / "stores")
    delete_places(survey(tmp_path / "stores"), [str(work)])


def test_trials_checkpoints_are_protected_by_the_lease_of_their_sweep(
    make_sweep: MakeSweep, make_run: MakeRun, hold_lease: HoldLease, tmp_path: Path
) -> None:
    sweep = make_sweep(sweep_dir=str(tmp_path / "sweep"), num_trials=2)
    journal = Journal(sweep.place)
    for number in range(2):
        journal.start(number, {"lora.rank": 4})
        make_run(place=trial_dir(sweep.place, number), stop_after=2)
        (trial_dir(sweep.place, number) / LEASE_FOLDER).delete()
    journal.end(0, "stopped")
    (sweep.place / "sweep.yaml").write_bytes(to_yaml(sweep).encode())
    ended, open_trial = (list_checkpoints(trial_dir(sweep.place, number))[0] for number in (0, 1))
    assert set(candidates(tmp_path / "sweep")) == {ended}
    assert "can be resumed" in refuse(open_trial, tmp_path / "sweep")
    driver = hold_lease(sweep.place)
    assert f"process {driver.pid}" in refuse(ended, tmp_path / "sweep")
    driver.kill()
    driver.wait()
    delete_places(survey(tmp_path / "sweep"), [str(ended)])
    assert not ended.exists()


def test_cache_of_this_machine_may_go_while_nothing_runs(
    make_run: MakeRun, hold_lease: HoldLease, own_cache: Path, tmp_path: Path
) -> None:
    own_cache.mkdir(parents=True)
    (own_cache / "0123.arrow").write_bytes(b"x" * 700)
    make_old(own_cache)
    config = make_run(stop_after=1)
    driver = hold_lease(config.run_place)
    assert "may read it" in refuse(own_cache, tmp_path / "runs")
    driver.kill()
    driver.wait()
    assert delete_places(survey(tmp_path / "runs"), [str(own_cache)]) == 700
    assert not own_cache.exists()


def test_copy_of_a_model_that_a_process_reads_stays_in_the_cache(
    own_cache: Path, tmp_path: Path
) -> None:
    for name in ("used", "unused"):
        (own_cache / "folders" / name).mkdir(parents=True)
        (own_cache / "folders" / name / "model.safetensors").write_bytes(b"x" * 300)
    make_old(own_cache)
    (own_cache / "folders" / ".locks").mkdir()
    (tmp_path / "runs").mkdir()
    with (own_cache / "folders" / ".locks" / "used.use").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert "in use" in refuse(own_cache / "folders" / "used", tmp_path / "runs")
        assert "in use" in refuse(own_cache, tmp_path / "runs")
        unused = str(own_cache / "folders" / "unused")
        assert delete_places(survey(tmp_path / "runs"), [unused]) == 300
    assert delete_places(survey(tmp_path / "runs"), [str(own_cache)]) == 300


def test_foreign_directory_is_refused_and_with_it_everything_else(
    make_run: MakeRun, tmp_path: Path
) -> None:
    config = make_run()
    (tmp_path / "runs" / "notes").mkdir()
    old = list_checkpoints(config.run_place)[0]
    names = [str(old), str(tmp_path / "runs" / "notes")]
    with pytest.raises(ConfigError, match="nor a directory of a job"):
        delete_places(survey(tmp_path / "runs"), names)
    assert old.exists()


def test_prune_without_names_deletes_nothing_and_says_what_it_would_free(
    make_run: MakeRun, tmp_path: Path
) -> None:
    config = make_run()
    before = sorted((tmp_path / "runs").rglob("*"))
    shown = render_candidates(find_candidates(survey(tmp_path / "runs")), 160)
    assert "may be deleted; nothing was" in shown
    assert list_checkpoints(config.run_place)[0].name in shown
    assert sorted((tmp_path / "runs").rglob("*")) == before
