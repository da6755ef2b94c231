"""The command `raytune runs`, from its arguments to what it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_llama.cli import VERBS
from raytune_llama.train.checkpoint.layout import list_checkpoints
from tests.runs.conftest import MakeRun


def runs(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return what the command prints."""
    assert VERBS["runs"](list(map(str, arguments)), "raytune runs") == 0
    return capsys.readouterr().out


def test_list_without_directories_looks_where_jobs_write(
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_run("one", stop_after=2)
    monkeypatch.chdir(tmp_path)
    assert "runs/one" in runs(capsys, "list")
    (entry,) = json.loads(runs(capsys, "list", "--json"))["entries"]
    assert entry["state"] == "interrupted"


def test_show_diff_and_prune_of_the_same_runs(
    make_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RAYTUNE_LLAMA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    config = make_run("one")
    make_run("two", optim__learning_rate=0.02)
    monkeypatch.chdir(tmp_path)
    assert "finished" in runs(capsys, "show", "runs/one")
    assert "optim.learning_rate: 0.01 -> 0.02" in runs(capsys, "diff", "runs/one", "runs/two")
    document = json.loads(runs(capsys, "diff", "runs/one", "runs/two", "--json"))
    assert document["settings"] == ["optim.learning_rate: 0.01 -> 0.02"]
    (old, *_) = list_checkpoints(config.run_place)
    listed = json.loads(runs(capsys, "prune", "runs", "--json"))
    (size,) = [each["bytes"] for each in listed if each["place"] == str(old)]
    freed = json.loads(runs(capsys, "prune", "runs", "--json", "--delete", old))
    assert freed == {"freed_bytes": size}
    assert not old.exists()


def test_mistake_exits_2_without_a_traceback(tmp_path: Path) -> None:
    code = "from raytune_llama.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "runs", "show", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("RUN: ")
    assert "Traceback" not in done.stderr


def test_list_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from raytune_llama.runs.command import run_command;"
        f"run_command(['list', {str(tmp_path)!r}], 'raytune runs', 80);"
        "print(sorted({'torch', 'transformers', 'peft', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
