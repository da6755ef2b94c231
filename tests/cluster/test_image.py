"""The Dockerfile names what exists; `run-job` starts a command again only where it should."""

import fnmatch
import os
import re
import subprocess
from pathlib import Path

import pytest

import raytune_llama
from tests.cluster.manifests import ROOT

DOCKER = ROOT / "cluster" / "docker"
RUN_JOB = DOCKER / "run_job.sh"


def instructions() -> list[tuple[str, str]]:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(kind, rest) for kind, rest in lines]


def arguments_of(kind: str) -> list[str]:
    return [rest for found, rest in instructions() if found == kind]


def test_version_is_that_of_the_package() -> None:
    versions = [rest for rest in arguments_of("ARG") if rest.startswith("VERSION=")]
    assert versions == [f"VERSION={raytune_llama.__version__}"]
    tags = re.findall(r"raytune-llama:([\w.]+)-", (DOCKER / "Dockerfile").read_text("utf-8"))
    assert set(tags) == {raytune_llama.__version__}


def copied() -> list[str]:
    words = [rest.split() for rest in arguments_of("COPY")]
    return [source for line in words if not line[0].startswith("--from") for source in line[:-1]]


@pytest.mark.parametrize("source", copied())
def test_copied_file_exists_and_is_not_ignored(source: str) -> None:
    assert (ROOT / source).exists()
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    assert f"!{source}" in patterns


@pytest.mark.parametrize(
    "name", [".venv/bin/python", "runs/demo/run.yaml", "keys.txt", ".git/config"]
)
def test_other_files_do_not_get_into_an_image(name: str) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert not any(fnmatch.fnmatch(name, f"{pattern}*") for pattern in kept)


def test_images_begin_with_images_of_the_default_registry() -> None:
    names = [rest.split()[0] for rest in arguments_of("FROM")]
    assert all("/" not in name for name in names)


def test_last_user_is_a_number_and_not_root() -> None:
    users = arguments_of("USER")
    assert users
    assert users[-1].isdigit()
    assert int(users[-1]) > 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that `run-job` and `stop-jobs` share."""
    return tmp_path / "jobs"


def run_job(folder: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(RUN_JOB), *command],
        env={**os.environ, "RAYTUNE_JOBS_DIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def counting(tmp_path: Path, *, statuses: str, then: str = ":") -> list[str]:
    """A command that ends with the next of some statuses at each start, after doing something."""
    number = f"$(($(wc -l < {tmp_path}/starts) - 1))"
    code = f'echo start >> {tmp_path}/starts; {then}; set -- {statuses}; shift {number}; exit "$1"'
    return ["bash", "-c", code]


def starts(tmp_path: Path) -> int:
    return len((tmp_path / "starts").read_text().splitlines())


@pytest.mark.parametrize(
    ("statuses", "status", "number"),
    [("0", 0, 1), ("2", 2, 1), ("1", 1, 1), ("75 0", 0, 2), ("75 75 1", 1, 3), ("130", 130, 1)],
)
def test_command_is_started_again_after_75_only(
    tmp_path: Path, folder: Path, statuses: str, status: int, number: int
) -> None:
    assert run_job(folder, *counting(tmp_path, statuses=statuses)).wait(30) == status
    assert starts(tmp_path) == number
    assert not list(folder.glob("*.job"))


def test_command_is_not_started_again_where_the_head_is_being_stopped(
    tmp_path: Path, folder: Path
) -> None:
    command = counting(tmp_path, statuses="75 0", then=f"touch {folder}/stopping")
    assert run_job(folder, *command).wait(30) == 75
    assert starts(tmp_path) == 1
    # Nor is another.
    assert run_job(folder, *counting(tmp_path, statuses="0")).wait(30) == 75
    assert starts(tmp_path) == 1


def test_command_is_not_started_again_where_the_job_is_being_stopped(
    tmp_path: Path, folder: Path
) -> None:
    # Ray sends SIGTERM to every process of the job.
    saving = "trap : TERM; kill -TERM $PPID $$"
    command = counting(tmp_path, statuses="75 0", then=saving)
    assert run_job(folder, *command).wait(30) == 75
    assert starts(tmp_path) == 1
