"""Promise: what contributors are told to run exists, and the version is in one place."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

import raytune_llama

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GITHUB = ROOT / ".github"
PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", ".github/pull_request_template.md")
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
MAKE = re.compile(r"`make ([a-z-]+)|^ +make ([a-z-]+)|^make ([a-z-]+)", re.MULTILINE)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def read_yaml(name: str) -> Any:  # noqa: ANN401  # any YAML
    return yaml.safe_load(read(name))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))


def named_targets(name: str) -> set[str]:
    return {target for match in MAKE.findall(read(name)) for target in match if target}


def test_version_is_written_in_one_file() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "raytune_llama/__init__.py"
    found = re.findall(r"^__version__ = \"(.+)\"$", read("raytune_llama/__init__.py"), re.MULTILINE)
    assert found == [raytune_llama.__version__]
    assert re.fullmatch(r"\d+\.\d+\.\d+", raytune_llama.__version__)


def test_command_prints_the_version() -> None:
    code = "from raytune_llama.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{raytune_llama.__version__}\n"


def test_changelog_has_the_version_and_what_comes_next() -> None:
    heads = re.findall(r"^## (.+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert heads[0] == "Unreleased" or heads[0].startswith(raytune_llama.__version__)
    assert any(head.startswith(raytune_llama.__version__) for head in heads)


def test_workflow_runs_what_a_checkout_runs_on_every_supported_python() -> None:
    workflow = read_yaml(".github/workflows/check.yml")
    job = workflow["jobs"]["check"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["bash .ci/run"]
    assert (ROOT / ".ci" / "run").is_file()
    supported = [
        name.rpartition(" ")[2]
        for name in PROJECT["project"]["classifiers"]
        if name.startswith("Programming Language :: Python :: 3.")
    ]
    assert job["strategy"]["matrix"]["python"] == supported
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.13"
    # YAML 1.1 reads the key `on` as true.
    assert "pull_request" in workflow[True]
    assert named_targets(".ci/run") == {"check", "test"}


def hooks() -> Iterator[dict[str, Any]]:
    for repository in read_yaml(".pre-commit-config.yaml")["repos"]:
        assert repository["repo"] == "local"  # no other versions than those of the environment
        yield from repository["hooks"]


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook["id"])
def test_hook_calls_a_tool_of_the_environment(hook: dict[str, Any]) -> None:
    assert hook["language"] == "system"
    program, *arguments = hook["entry"].split()
    assert program.startswith(".venv/bin/")
    name = Path(program).name
    scripts = {script.name for script in entry_points(group="console_scripts")}
    assert name in {"python", "ruff", *scripts}
    assert all((ROOT / argument).is_file() for argument in arguments if argument.endswith(".py"))


@pytest.mark.parametrize("form", ["bug.yml", "feature.yml"])
def test_issue_form_has_what_a_form_needs(form: str) -> None:
    content = read_yaml(f".github/ISSUE_TEMPLATE/{form}")
    assert content["name"]
    assert content["description"]
    fields = [part for part in content["body"] if part["type"] != "markdown"]
    assert all(part["attributes"]["label"] for part in fields)
    names = [part["id"] for part in fields]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("page", [*PAGES, ".ci/run"])
def test_make_targets_that_a_page_names_exist(page: str) -> None:
    assert named_targets(page) <= make_targets()


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_point_to_existing_files(page: str) -> None:
    links = [link for link in LINK.findall(read(page)) if "://" not in link]
    assert not [link for link in links if not ((ROOT / page).parent / link).exists()]


def test_contributing_names_commands_and_files_that_exist() -> None:
    text = read("CONTRIBUTING.md")
    assert {"venv", "check", "test-fast", "test"} <= named_targets("CONTRIBUTING.md")
    files = re.findall(r"`((?:raytune_llama|tests)/[\w/.]*)`", text)
    assert files
    assert not [file for file in files if not (ROOT / file).exists()]
