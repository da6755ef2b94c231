"""A job tells its user's mistakes from its own bugs by exit status and traceback."""

import pickle
import subprocess
import sys

import pytest

from raytune_llama.config.settings import ConfigError

JOB = """
import sys
from raytune_llama import cli
from raytune_llama.config.settings import ConfigError
from raytune_llama.data.store.manifest import StoreError

def main(argv, program):
    kinds = {"config": ConfigError(["a.b: bad", "c: bad"]), "store": StoreError("stale store"),
             "value": ValueError("a bug"), "interrupt": KeyboardInterrupt()}
    if sys.argv[1] in kinds:
        raise kinds[sys.argv[1]]
    return int(sys.argv[1]) or None

cli.VERBS["job"] = main
cli.run("job")
"""


@pytest.mark.parametrize(
    ("argument", "status", "stderr"),
    [
        ("config", 2, "a.b: bad\nc: bad\n"),
        ("store", 2, "stale store\n"),
        ("0", 0, ""),
        ("3", 3, ""),
    ],
)
def test_job_exits_with_status_and_message(argument: str, status: int, stderr: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", JOB, argument], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (status, stderr)


def test_job_keeps_the_traceback_of_a_bug() -> None:
    done = subprocess.run(
        [sys.executable, "-c", JOB, "value"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a bug" in done.stderr


@pytest.mark.parametrize("status", [75, 130])
def test_job_that_is_stopped_exits_with_the_command_to_repeat_and_no_traceback(status: int) -> None:
    argument = "75" if status == 75 else "interrupt"
    done = subprocess.run(
        [sys.executable, "-c", JOB, argument, "a.b=c d"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"python -c {argument} 'a.b=c d'")


def test_import_needs_no_heavy_package() -> None:
    heavy = "{'ray', 'torch', 'transformers'} & set(sys.modules)"
    code = f"import sys, raytune_llama.config.settings; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_error_survives_pickling_with_its_problems() -> None:
    error = pickle.loads(pickle.dumps(ConfigError(["a: x", "b: y"])))  # noqa: S301
    assert error.problems == ["a: x", "b: y"]
    assert str(error) == "a: x\nb: y"
