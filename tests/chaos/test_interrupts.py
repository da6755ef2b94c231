"""Promise: Ctrl-C and a closed terminal lose no step, and the same command resumes."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.config.settings import write_yaml
from raytune_llama.train.config import PretrainConfig
from tests.chaos.conftest import FIELDS, MakeRun, assert_equal_runs
from tests.pipeline.conftest import losses, own_cluster
from tests.terminal import Terminal

# Long enough that the key is pressed while it trains, and no checkpoint but the asked one.
LONG: dict[str, Any] = {
    "max_steps": 3000,
    "checkpoint__every_steps": 5000,
    "checkpoint__keep_best": False,
}
RARE = {**LONG, "max_steps": FIELDS["max_steps"]}


def start(config: PretrainConfig, folder: Path, *, nohup: bool = False) -> Terminal:
    """Start `python jobs/pretrain.py` as the foreground job of a terminal."""
    write_yaml(config, folder / "job.yaml")
    command = [sys.executable, "jobs/pretrain.py", str(folder / "job.yaml")]
    return Terminal(command, nohup=nohup, environment=own_cluster())


def newest_step(config: PretrainConfig) -> float:
    return max(losses(config), default=0)


def saved_steps(config: PretrainConfig) -> list[int]:
    folder = Path(config.run_dir) / "checkpoints"
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


@pytest.mark.ray
def test_ctrl_c_in_a_terminal_saves_the_very_step_exits_75_and_says_how_to_resume(
    make_run: MakeRun, tmp_path: Path
) -> None:
    config = make_run(**LONG)
    with start(config, tmp_path) as terminal:
        terminal.wait_until(lambda: newest_step(config) >= 3)
        terminal.press_ctrl_c()
        assert terminal.wait() == 75
    assert saved_steps(config) == [newest_step(config)]
    assert f"stopped at step {newest_step(config):.0f}" in terminal.printed
    assert f"to resume: python jobs/pretrain.py {tmp_path / 'job.yaml'}\n" in terminal.printed
    assert "Traceback" not in terminal.printed


@pytest.mark.ray
@pytest.mark.slow  # Two Ray clusters, and the undisturbed run.
@pytest.mark.parametrize("end", ["ctrl-c", "closed terminal"])
def test_run_that_is_stopped_in_its_terminal_and_resumed_equals_the_undisturbed_run(
    make_run: MakeRun, whole: PretrainConfig, tmp_path: Path, end: str
) -> None:
    config = make_run(**RARE)
    with start(config, tmp_path) as terminal:
        terminal.wait_until(lambda: newest_step(config) >= 30)
        terminal.close() if end == "closed terminal" else terminal.press_ctrl_c()
        assert terminal.wait() == 75
    assert saved_steps(config) == [newest_step(config)]
    assert newest_step(config) < 400
    with start(config, tmp_path) as terminal:
        assert terminal.wait() == 0, terminal.printed
    assert "resumed from" in terminal.printed
    assert_equal_runs(config, whole)


@pytest.mark.ray
@pytest.mark.slow  # Two Ray clusters.
def test_run_that_is_stopped_before_its_first_step_resumes_and_nohup_outlives_its_terminal(
    make_run: MakeRun, tmp_path: Path
) -> None:
    config = make_run(**LONG)
    with start(config, tmp_path) as terminal:
        # Ray starts next.
        terminal.wait_until(lambda: any((Path(config.run_dir) / ".lease").glob("*")))
        terminal.press_ctrl_c()
        assert terminal.wait() == 75
    assert f"to resume: python jobs/pretrain.py {tmp_path / 'job.yaml'}\n" in terminal.printed
    assert "Traceback" not in terminal.printed
    with start(config, tmp_path, nohup=True) as terminal:
        terminal.wait_until(lambda: newest_step(config) >= 1)
        terminal.close()
        seen = newest_step(config)
        terminal.wait_until(lambda: newest_step(config) >= seen + 20)
        os.kill(terminal.process.pid, signal.SIGTERM)
        assert terminal.wait() == 75
    assert saved_steps(config) == [newest_step(config)]


@pytest.mark.ray
@pytest.mark.slow  # A Ray cluster of its own.
def test_second_ctrl_c_ends_a_run_at_once_with_130(make_run: MakeRun, tmp_path: Path) -> None:
    # A step that takes so long that the first Ctrl-C has to wait.
    config = make_run(**LONG, batch__sequences_per_step=4096)
    with start(config, tmp_path) as terminal:
        terminal.wait_until(lambda: newest_step(config) >= 1)
        assert terminal.press_ctrl_c_until_it_ends() < 10
        assert terminal.wait() == 130
    assert "Traceback" not in terminal.printed


@pytest.mark.ray
@pytest.mark.slow  # Two Ray clusters.
def test_prepare_data_stopped_by_ctrl_c_keeps_its_units_and_resumes(
    job_inputs: Path, tmp_path: Path
) -> None:
    line = (job_inputs / "corpus" / "0.txt").read_text().replace("\n", " ")
    (tmp_path / "corpus").mkdir()
    for number in range(8):
        text = f"{number} {line}\n" * (2**20 // len(line.encode()))
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    command = [
        *(sys.executable, "jobs/prepare_data.py", f"tokenizer={job_inputs / 'model'}"),
        *(
            f"data.sources=[{{path: {tmp_path / 'corpus'}}}]",
            f"data.store_dir={tmp_path / 'store'}",
        ),
        *("data.validation_fraction=0", "data.range_mib=1", "data.num_workers=1"),
    ]

    def num_units() -> int:
        return len([*tmp_path.glob("store.partial-*/units/*.json")])

    with Terminal(command, environment=own_cluster()) as terminal:
        terminal.wait_until(lambda: num_units() > 0)
        terminal.press_ctrl_c()
        assert terminal.wait() == 75
    assert "Traceback" not in terminal.printed
    ((kept, total),) = re.findall(r"(\d+) of (\d+) units are", terminal.printed)
    assert 0 < int(kept) <= num_units() < int(total)
    assert "to resume: python jobs/prepare_data.py " in terminal.printed
    assert not (tmp_path / "store").exists()
    with Terminal(command, environment=own_cluster()) as terminal:
        assert terminal.wait() == 0, terminal.printed
    (reused,) = re.findall(rf" {total}/{total} units \((\d+) from an earlier run", terminal.printed)
    assert int(reused) >= int(kept)
    assert (tmp_path / "store" / "manifest.json").exists()
