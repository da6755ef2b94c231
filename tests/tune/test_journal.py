from pathlib import Path

import pytest

from raytune_llama.storage.place import Place
from raytune_llama.tune.journal import JOURNAL_FILE, Journal


@pytest.fixture(params=["local", "s3"])
def sweep_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place.local(tmp_path / "sweep")
    return request.getfixturevalue("s3_path")


def test_journal_read_again_is_what_was_written(sweep_dir: Place) -> None:
    journal = Journal(sweep_dir)
    journal.start(0, {"optim.learning_rate": 0.1 + 0.2, "lora.targets": ["q", "中"]})
    journal.report(0, 4, 2.5, 10.0)
    journal.start(1, {"optim.learning_rate": 1.0})
    journal.report(0, 8, 2.25, 19.5)
    journal.end(0, "finished")
    journal.end(1, "failed", "no such\nfile")

    again = Journal(sweep_dir)
    assert again.trials == journal.trials
    first = again.trials[0]
    assert (first.step, first.value, first.seconds, first.state) == (8, 2.25, 19.5, "finished")
    assert first.sample["optim.learning_rate"] == 0.1 + 0.2
    assert again.trials[1].cause == "no such\nfile"


def test_journal_with_a_cut_line_goes_on_behind_the_last_whole_one(sweep_dir: Place) -> None:
    journal = Journal(sweep_dir)
    journal.start(0, {"a": 1})
    journal.report(0, 4, 2.5, 10.0)
    file = sweep_dir / JOURNAL_FILE
    file.write_bytes(file.read_bytes()[:-7])

    cut = Journal(sweep_dir)
    assert cut.trials[0].values == {}
    cut.report(0, 4, 2.5, 10.0)
    assert Journal(sweep_dir).trials[0].values == {4: 2.5}
